"""Starting programs on virtual hosts: which launcher, what environment, and an end for all of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from virtual.kernel import GRACE_S, run
from virtual.shape import ClusterError

# Messages between hosts take the network: libraries that see one machine under all of them might take its memory.
DEFAULTS = {
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "FI_PROVIDER": "tcp",
    "UCX_TLS": "tcp,self",
    "UCX_NET_DEVICES": "eth0",
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def environment(cpu: float | None, ppn: int, extra: Mapping[str, str] | None) -> dict[str, str]:
    """Return this process's environment with what ranks need, and no more threads than a host has cores.

    Parameters
    ----------
    cpu : float or None
        Cores of a host.
    ppn : int
        Ranks that share them.
    extra : mapping or None
        Goes before everything.
    """
    threads = {} if cpu is None else {"OMP_NUM_THREADS": str(max(1, int(cpu / ppn)))}
    return DEFAULTS | threads | dict(os.environ) | dict(extra or {})


def find_launcher(mpi: str) -> tuple[str, str]:
    """Return the MPI library ("mpich" or "openmpi") and its launcher; on PATH, or beside this Python."""
    names = {"mpich": ["mpiexec.hydra", "mpiexec"], "openmpi": ["mpirun", "mpiexec"], "auto": ["mpiexec", "mpirun"]}
    for name in names[mpi]:
        path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
        if path is None:
            continue
        version = run(f"{path} --version")
        library = "mpich" if "HYDRA" in version else "openmpi" if re.search("Open MPI|PRRTE", version) else None
        if library is not None and mpi in ("auto", library):
            return library, path
    kind = "MPICH or Open MPI" if mpi == "auto" else mpi
    raise ClusterError(f"no mpiexec of {kind} is on PATH. Activate the environment that has it.")


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Ask processes to end, and after a while make them."""
    for process in processes:
        process.terminate()
    give_up = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, give_up - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
