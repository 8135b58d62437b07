"""CUDA sources to machine code (cubin): compiled when first needed, once for all ranks of a node, and kept.

The compiler is NVRTC, which CuPy loads, or else nvcc. Machine code lies in the cache (`hpcnn.ops.cuda.cache`) under a
name made from everything that it depends on: the source with all headers of ours, the architecture, the compiler and
its options. A checksum at its end tells whole files from damaged ones.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import hpcnn
from hpcnn.errors import DeviceError
from hpcnn.ops.cuda import cache

STANDARD = "--std=c++17"
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
MARKER = re.compile(r"^//\s*architectures:\s*(.+)$", re.MULTILINE)
MARKER_LINES = 20
MOST_THREADS = 8
FIRST_SPECIFIC = 90
"""From sm_90 on, machine code for exactly one architecture, such as sm_90a, has instructions that no other has."""
INSTALL = "Install CuPy with its compiler (`pip install 'hpcnn[cuda13]'`), or put nvcc on PATH."


def _quiet(message: str) -> None:
    """Take no notice."""


on_compile: Callable[[str], None] = _quiet
"""Called with a line of text before a file is compiled, which takes seconds; the command line prints it."""


class Compiler(NamedTuple):
    """A way to compile: its name with version, and a function of (source, target) that returns machine code."""

    name: str
    run: Callable[[Path, str], bytes]


class Compiled(NamedTuple):
    """What became of one file for one architecture; `problem` says why it has no machine code."""

    source: str
    target: str
    seconds: float
    num_bytes: int
    cached: bool
    problem: str = ""


class CompileError(Exception):
    """The compiler refused a source; the text is all it said."""


def folder() -> Path:
    """Return where the CUDA sources are: the checkout, or the package that was installed."""
    checkout = Path(hpcnn.__file__).parent.parent / "kernels"
    if (checkout / "common.cuh").exists():
        return checkout
    return Path(str(resources.files("hpcnn.kernels")))


def sources() -> list[str]:
    """Return the names of all sources, without their ending."""
    return sorted(path.stem for path in folder().glob("*.cu"))


def fingerprint() -> str:
    """Return a hash of all sources and headers: what was measured with others says nothing about these."""
    digest = hashlib.sha256()
    for path in sorted([*folder().glob("*.cu"), *folder().glob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def target(architecture: int | str) -> str:
    """Return what to compile for: 80 -> "80", 90 -> "90a"."""
    text = str(architecture)
    return f"{text}a" if text.isdecimal() and int(text) >= FIRST_SPECIFIC else text


def restriction(source: str) -> list[str]:
    """Return the only targets a source is for; empty for all."""
    return restriction_of(_path(source).read_text())


def restriction_of(text: str) -> list[str]:
    """Return the targets that a line `// architectures: 90a` among a source's first names; empty without one."""
    found = MARKER.search("\n".join(text.splitlines()[:MARKER_LINES]))
    return re.findall(r"\w+", found[1]) if found else []


def closure(source: Path, *folders: Path) -> list[Path]:
    """Return a file and all that it includes by quoted names, from its own folder or else from `folders`.

    What is in none of them belongs to the compiler, as CUDA's own headers do.
    """
    found, waiting = list[Path](), [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        for name in INCLUDE.findall(path.read_text()):
            waiting += [folder / name for folder in (path.parent, *folders) if (folder / name).is_file()][:1]
    return found


def cubin(source: str, architecture: int | str) -> bytes:
    """Return the machine code of `kernels/<source>.cu`, from the cache if it is there.

    Parameters
    ----------
    source : str
        A file's name without its ending.
    architecture : int or str
        As in sm_90: 90, "90a".

    Raises
    ------
    DeviceError
        If there is no such file, it is not for this architecture, it does not compile, or there is no compiler.
    """
    return _obtain(source, target(architecture))[0]


def compile_all(architectures: Iterable[int | str]) -> list[Compiled]:
    """Compile every source for every architecture that it is for, so that later runs find all of it.

    Nothing is raised for a source that does not compile: its line says so. The GPU need not be here.
    """
    jobs = [
        (source, wanted)
        for wanted in dict.fromkeys(target(architecture) for architecture in architectures)
        for source in sources()
        if wanted in (restriction(source) or (wanted,))
    ]
    with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:  # compilers work without Python
        return list(pool.map(lambda job: _compiled(*job), jobs))


@once
def compiler() -> Compiler:
    """Return the compiler of this installation.

    Raises
    ------
    DeviceError
        If there is none.
    """
    try:
        return _nvrtc()
    except (ImportError, RuntimeError, OSError, DeviceError) as error:  # no CuPy, no library, or no headers
        try:
            return _nvcc()
        except DeviceError:
            why = str(error) if isinstance(error, DeviceError) else f"{type(error).__name__}: {error}".strip()
    raise DeviceError(f"kernels: no CUDA compiler ({' '.join(why.split())}). {INSTALL}")


def _compiled(source: str, wanted: str) -> Compiled:
    """Compile one source if need be, and say how that went."""
    started = time.monotonic()
    try:
        code, cached = _obtain(source, wanted)
        return Compiled(source, wanted, time.monotonic() - started, len(code), cached)
    except DeviceError as error:
        return Compiled(source, wanted, time.monotonic() - started, 0, False, str(error))


def _path(source: str) -> Path:
    path = folder() / f"{source}.cu"
    if not path.exists():
        raise DeviceError(f"kernels: no source {path}. Reinstall with `pip install --force-reinstall hpcnn`.")
    return path


def _obtain(source: str, wanted: str) -> tuple[bytes, bool]:
    """Return machine code, and whether it had been compiled before."""
    only = restriction(source)
    if only and wanted not in only:
        raise DeviceError(f"kernels: {source} is for sm_{', sm_'.join(only)}, not for sm_{wanted}.")
    chosen = compiler()
    name = f"{source}-sm_{wanted}-{_key(source, wanted, chosen.name)}.cubin"
    code = _load(name)
    if code is not None:
        return code, True
    with cache.lock(name):
        code = _load(name)  # by whoever had the lock before
        if code is not None:
            return code, True
        on_compile(f"compiling kernels {source} for sm_{wanted}")
        try:
            code = chosen.run(_path(source), wanted)
        except CompileError as error:
            raise _refused(source, wanted, chosen, str(error)) from None
        cache.write(name, code + hashlib.sha256(code).digest())
    return code, False


def _load(name: str) -> bytes | None:
    """Return machine code from the cache if it is there and whole."""
    contents = cache.read(name)
    if contents is None or len(contents) <= hashlib.sha256().digest_size:
        return None
    code, checksum = contents[:-32], contents[-32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _key(source: str, wanted: str, compiler_name: str) -> str:
    """Return a hash of all that machine code depends on."""
    digest = hashlib.sha256("\0".join((wanted, compiler_name, STANDARD)).encode())
    for path in closure(_path(source)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _refused(source: str, wanted: str, chosen: Compiler, log: str) -> DeviceError:
    """Return the error for a source that does not compile; all that the compiler said goes to a file."""
    place = cache.write(f"{source}-sm_{wanted}.log", log.encode())
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
    where = f"The whole log is {place}" if place else "The log could not be kept"
    return DeviceError(
        f"kernels: {source} does not compile for sm_{wanted} with {chosen.name}: {first}. {where}; "
        "a compiler of another CUDA version may do (`hpcnn doctor` names the one in use)."
    )


def _nvrtc() -> Compiler:
    """Return the compiler library that CuPy finds, if CUDA's headers are found as well."""
    from cupy_backends.cuda.libs import nvrtc

    major, minor = nvrtc.getVersion()
    headers = cuda_headers()
    options = [STANDARD, "-default-device", *(f"-I{path}" for path in headers)]

    def run(source: Path, wanted: str) -> bytes:
        program = nvrtc.createProgram(source.read_text(), str(source), (), ())
        try:
            nvrtc.compileProgram(program, (f"-arch=sm_{wanted}", f"-I{source.parent}", *options))
            return bytes(nvrtc.getCUBIN(program))
        except nvrtc.NVRTCError as error:
            raise CompileError(nvrtc.getProgramLog(program) or str(error)) from None
        finally:
            nvrtc.destroyProgram(program)

    return Compiler(f"NVRTC {major}.{minor}", run)


def _nvcc() -> Compiler:
    """Return the compiler driver of the CUDA toolkit, from PATH, CUDA_HOME or CUDA_PATH."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    program = shutil.which("nvcc") or next(
        filter(None, (shutil.which("nvcc", path=f"{root}/bin") for root in roots)), None
    )
    if program is None:
        raise DeviceError("nvcc is not on PATH")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    version = re.search(r"\bV(\d+\.\d+\.\d+)", said)

    def run(source: Path, wanted: str) -> bytes:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "kernels.cubin"
            command = [program, "-cubin", f"-arch=sm_{wanted}", STANDARD, "-o", str(out), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not out.exists():
                raise CompileError(done.stderr or done.stdout)
            return out.read_bytes()

    return Compiler(f"nvcc {version[1] if version else 'of unknown version'}", run)


def cuda_headers() -> list[Path]:
    """Return the folders of CUDA's headers, beside the NVRTC library first.

    Raises
    ------
    DeviceError
        If none has cuda_bf16.h.
    """
    import cupy
    from cupy.cuda import get_cuda_path

    found = [get_cuda_path()]  # where the compiler library is; None for the wheels of CUDA 12, each a folder of its own
    candidates = [Path(root) / "include" for root in found if root]
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        candidates += map(Path, filter(None, [find_nvidia_header_directory("cudart")]))
    except ImportError:  # a CuPy from before it
        pass
    roots = (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    candidates += [Path(root) / "include" for root in roots if root]
    for candidate in candidates:
        if (candidate / "cuda_bf16.h").exists():
            # cuda_bf16.h of some versions wants nv/target, which the toolkit has in a folder below and CuPy brings.
            more = [candidate / "cccl", Path(cupy.__file__).parent / "_core/include/cupy/_cccl/libcudacxx"]
            return [candidate, *(path for path in more if (path / "nv/target").exists())]
    raise DeviceError("CUDA's headers are not here: no cuda_bf16.h")
