"""The worlds that tests on several ranks compare: all ranks, and each by itself. Made once, on all ranks alike."""

from __future__ import annotations

from functools import cache

from hpcnn.comm import World, start
from hpcnn.comm.library import load, node_share


@cache
def world() -> World:
    """Return the world of all ranks."""
    return start()


@cache
def alone() -> World:
    """Return a world of this rank only."""
    comm = load().COMM_SELF.Dup()
    return World(comm, node_share(comm), 1)
