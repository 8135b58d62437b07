"""The MPI library: loaded when it is first needed, not when a module is imported."""

from __future__ import annotations

import faulthandler
import functools
import math
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from hpcnn.comm.quota import cpu_quotas
from hpcnn.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI


SURVIVABLE = "OMPI_MCA_mpi_ft_enable"
"""What `mpirun --with-ft ulfm` of Open MPI sets on all ranks."""


START_S, GRACE_S = 600.0, 1.0
"""How long ranks that outlive others wait for one another at the start, and when they end after saying so."""


@functools.cache
def load() -> ModuleType:
    """Return mpi4py's module MPI; the first call initialises MPI with THREAD_MULTIPLE.

    Raises
    ------
    CommError
        If mpi4py or the MPI library behind it cannot be loaded.
    """
    survivable = SURVIVABLE in os.environ
    if survivable:
        # MPI_Finalize is a barrier over the launcher, which now and then still waits for the dead.
        os.environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")
    try:
        with started_within(START_S) if survivable else nullcontext():
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CommError(
            f"comm: no MPI library could be loaded ({reason[0]}); ranks need one to exchange messages."
            " Load the site's MPI module and `pip install mpi4py`, or `pip install 'hpcnn[mpich]'`."
        ) from None
    return MPI


@contextmanager
def started_within(seconds: float) -> Iterator[None]:
    """End this process if the block, in which MPI starts, takes longer.

    A launcher that lets ranks outlive others does not end the job for one that is killed before it has started, and the
    others wait for it for ever, inside the library and with the interpreter's lock. So no thread of Python's can help:
    what ends this process, with code 1, is that of `faulthandler`, and what says why another process, of rank 0.
    """
    words = (
        f"hpcnn: error: comm: MPI has not started in {seconds:g} s: a rank was killed meanwhile, or is very late; the"
        " job is ended. Start it again."
    )
    speaker = None
    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0":
        command = ["/bin/sh", "-c", 'sleep "$1"; echo "$2" >&2', "hpcnn", f"{seconds}", words]
        speaker = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            if speaker is not None:
                with suppress(ProcessLookupError):
                    os.killpg(speaker.pid, signal.SIGKILL)
                speaker.wait()


class NodeShare(NamedTuple):
    """What this rank has of its node."""

    local_rank: int
    local_size: int
    num_cores: int
    """Cores this process may run on."""
    num_sharing: int
    """Ranks that may run on one of those cores, this one included."""

    quota_cores: float = math.inf
    """Cores' worth of time that the tightest quota grants, such as 0.45 or 2; infinite without one."""
    num_sharing_quota: int = 1
    """Ranks that share that quota, this one included."""
    nodes: tuple[int, ...] = (0,)
    """The node of every rank, numbered in the order of their first ranks."""

    @property
    def num_threads(self) -> int:
        """Cores for this rank alone: its fair share of cores and of the quota, at least one."""
        threads = self.num_cores // self.num_sharing
        if self.quota_cores < math.inf:
            threads = min(threads, math.ceil(self.quota_cores) // self.num_sharing_quota)
        return max(1, threads)

    @property
    def rationed(self) -> bool:
        """Whether a quota grants less than a core to each rank, however many cores there are."""
        return self.quota_cores < self.num_sharing_quota


def node_share(comm: MPI.Comm) -> NodeShare:
    """Return this rank's share of its node among the ranks of `comm` (collective)."""
    cores, quotas = _cores(), cpu_quotas()
    node = comm.Split_type(load().COMM_TYPE_SHARED, comm.rank)
    try:
        everyone: list[tuple[frozenset[int], dict[str, float]]] = node.allgather((cores, quotas))
        num_sharing = sum(not cores.isdisjoint(theirs) for theirs, _ in everyone)
        numbers: dict[int, int] = {}
        nodes = tuple(numbers.setdefault(first, len(numbers)) for first in comm.allgather(node.bcast(comm.rank)))
        share = NodeShare(node.rank, node.size, len(cores), num_sharing, nodes=nodes)
        num_members = Counter(group for _, theirs in everyone for group in theirs)
        limits = [(limit, num_members[group]) for group, limit in quotas.items()]
        if not limits:
            return share
        limit, num_sharing_quota = min(limits, key=lambda pair: pair[0] / pair[1])
        return share._replace(quota_cores=limit, num_sharing_quota=num_sharing_quota)
    finally:
        node.Free()


def _cores() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
