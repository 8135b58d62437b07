"""Ranks that die: told from other errors of the MPI library, and outlived where the library can.

User-level failure mitigation (ULFM, part of Open MPI 5) lets a job go on: whatever needs a dead rank raises an error,
instead of ending all. Who meets one revokes the communicators, so that ranks which wait for others than the dead meet
one too; then all that are left shrink to a communicator of their own (`World.survivors`).

A rank that hangs is no dead rank to the library. The watchdog's verdict makes it one, by a signal that cannot be
ignored: whoever runs on its node kills it.

References
----------
Bland, Bouteiller, Herault, Bosilca, Dongarra, "Post-failure recovery of MPI communication capability: design and
rationale", IJHPCA 2013.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpcnn.comm.library import SURVIVABLE, load
from hpcnn.errors import RankFailure

if TYPE_CHECKING:
    from mpi4py import MPI

GUARD_S = 60.0
"""How long the shrinking may take at least before it counts as hanging: it is made by blocking calls."""


def why_not_survivable() -> str:
    """Return why the death of a rank ends this job, as words; "" if the others can go on."""
    vendor, version = load().get_vendor()
    if vendor != "Open MPI" or version < (5, 0, 0):
        return f"the MPI library is {vendor} {'.'.join(map(str, version))}, not Open MPI 5"
    return "" if _enabled() else "mpirun was started without --with-ft ulfm"


def _enabled() -> bool:
    return os.environ.get(SURVIVABLE, "").lower() in ("1", "true", "yes")


def rank_failure(error: BaseException) -> RankFailure | None:
    """Return what an error means, if it is that of a library which lost a rank; None for any other."""
    mpi = load()
    if isinstance(error, RankFailure):
        return error
    if not isinstance(error, mpi.Exception):
        return None
    lost = [mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED]
    if _enabled():  # what collectives of the library make of it at times
        lost += [mpi.ERR_OTHER, mpi.ERR_INTERN]
    if error.Get_error_class() not in lost:
        return None
    return RankFailure(
        "comm: a rank died, and the run cannot go on without it. Start it again with --resume; or set"
        ' fault.on_rank_failure = "continue" and start it by `mpirun --with-ft ulfm` of Open MPI 5.'
    )


class Process(NamedTuple):
    """A process of this machine, wherever the description is read."""

    place: str
    """Machine and PID namespace: where `pid` means something."""
    pid: int
    begun: str
    """When it began: another process with its number began later."""

    @classmethod
    def here(cls) -> Process:
        """Return this process."""
        boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        try:
            place = f"{boot.read_text().strip()} {space.readlink()}"
        except OSError:
            place = ""  # nobody's place
        return cls(place, os.getpid(), _begun(os.getpid()))

    def kill(self) -> None:
        """End it at once, if it is still there; one that is stopped too."""
        if self.place and self.place == Process.here().place and self.begun == _begun(self.pid) != "":
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _begun(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def kill_hung(culprits: Sequence[int], processes: Sequence[Process]) -> bool:
    """Kill those of the ranks that run on this node; return whether each has a rank beside it that does so."""
    places = {process.place for rank, process in enumerate(processes) if rank not in culprits and process.place}
    if not culprits or any(processes[rank].place not in places for rank in culprits):
        return False
    for rank in culprits:
        processes[rank].kill()
    return True


@contextmanager
def guarded(seconds: float, end: Callable[[str], object]) -> Iterator[None]:
    """End the job if the block, which waits inside the MPI library, takes longer; 0: wait for ever."""
    words = f"comm: the ranks that are left have not found each other for {seconds:.0f} s; the job is ended."
    timer = threading.Timer(max(seconds, GUARD_S), end, [f"{words} Start it again with --resume."])
    timer.daemon = True
    if seconds > 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def agreed(comm: MPI.Intracomm, well: bool) -> bool:
    """Return whether no rank has died and all bring True; the same on all (collective, also when revoked)."""
    try:
        return bool(comm.Agree(int(well)))
    except load().Exception:  # also the same on all
        return False
