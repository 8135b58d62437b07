"""The MPI library: loaded when it is first needed, not when a module is imported."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from hpcnn.errors import CommError

if TYPE_CHECKING:
    from mpi4py import MPI


@functools.cache
def load() -> ModuleType:
    """Return mpi4py's module MPI; the first call initialises MPI with THREAD_MULTIPLE.

    Raises
    ------
    CommError
        If mpi4py or the MPI library behind it cannot be loaded.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CommError(
            f"comm: no MPI library could be loaded ({reason[0]}); ranks need one to exchange messages."
            " Load the site's MPI module and `pip install mpi4py`, or `pip install 'hpcnn[mpich]'`."
        ) from None
    return MPI


class NodeShare(NamedTuple):
    """What this rank has of its node."""

    local_rank: int
    local_size: int
    num_cores: int
    """Cores this process may run on."""
    num_sharing: int
    """Ranks that may run on one of those cores, this one included."""

    @property
    def num_threads(self) -> int:
        """Cores for this rank alone: its fair share, at least one."""
        return max(1, self.num_cores // self.num_sharing)

    @property
    def core_each(self) -> bool:
        """Whether no rank has to wait for another to leave its core."""
        return self.num_sharing <= self.num_cores


def node_share(comm: MPI.Comm) -> NodeShare:
    """Return this rank's share of its node among the ranks of `comm` (collective)."""
    mine = _cores()
    node = comm.Split_type(load().COMM_TYPE_SHARED, comm.rank)
    try:
        all_cores: list[frozenset[int]] = node.allgather(mine)
        return NodeShare(node.rank, node.size, len(mine), sum(not mine.isdisjoint(cores) for cores in all_cores))
    finally:
        node.Free()


def _cores() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
