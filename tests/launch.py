"""Starts MPI jobs from tests, whatever MPI is installed. Not for use inside one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# What launchers leave in the environment of their ranks; a job started from a rank must not find it.
_LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "HYDI_", "HYDRA_", "MPI_LOCAL", "MPIR_", "SLURM_", "PRTE_")


class Result(NamedTuple):
    """How a job ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines in which hpcnn itself reports an error."""
        return [line for line in self.stderr.splitlines() if line.startswith("hpcnn: error")]


@cache
def mpiexec() -> str | None:
    """Return the launcher that belongs to this interpreter's environment, else the one on PATH, else None."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


@cache
def launcher_version() -> str:
    """Return what the launcher says of itself, "" without one."""
    if mpiexec() is None:
        return ""
    return subprocess.run([mpiexec(), "--version"], capture_output=True, text=True, timeout=30).stdout


def reason_to_skip() -> str:
    """Return why no job can be started here, "" if one can."""
    if mpiexec() is None:
        return "there is no mpiexec; pip install 'hpcnn[mpich]'"
    if any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")):
        return "already inside an MPI job"
    return ""


def command(n: int) -> list[str]:
    """Return the launcher's command line up to the program, for `n` ranks on however few cores."""
    oversubscribe = ["--oversubscribe"] if "Open MPI" in launcher_version() or "OpenRTE" in launcher_version() else []
    return [mpiexec() or "mpiexec", "-n", str(n), *oversubscribe]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a job: this one without a launcher's traces, and Open MPI allowed to run as root."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_PREFIXES)}
    clean |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PYTHONUNBUFFERED": "1"}
    if shutil.which("ssh") is None and shutil.which("rsh") is None:
        clean["OMPI_MCA_plm_rsh_agent"] = "false"  # Open MPI 4 wants to see one, though all ranks are here
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return clean | dict(extra or {})


def start_job(
    n: int,
    program: str | Path,
    args: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    """Start a Python file (a Path) or module (a str) on `n` ranks; its output goes to pipes."""
    what = [str(program)] if isinstance(program, Path) else ["-m", program]
    return subprocess.Popen(
        [*command(n), sys.executable, *what, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(env),
        cwd=cwd,
        start_new_session=True,
    )


def launch(
    n: int,
    program: str | Path,
    args: Sequence[str] = (),
    *,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Run a Python file (a Path) or module (a str) on `n` ranks and return how it ended.

    Raises
    ------
    TimeoutError
        If it does not end within `timeout` seconds; all its processes are killed.
    """
    begin = time.monotonic()
    process = start_job(n, program, args, env=env, cwd=cwd)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the launcher takes its ranks along
        try:
            stdout, stderr = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
        raise TimeoutError(f"{program} on {n} ranks was still running after {timeout} s:\n{stdout}\n{stderr}") from None
    return Result(process.returncode, stdout, stderr, time.monotonic() - begin)
