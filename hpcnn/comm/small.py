"""Short collectives, run at once: a few microseconds a step, where the state machine of `collective` costs twenty.

Statistics of batch norm and the totals of a step are a few numbers that every rank waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpcnn.plan.schedules import Addition, Schedule

if TYPE_CHECKING:
    from mpi4py import MPI

SMALL_BYTES = 64 << 10
"""Arrays up to here; their messages need not be cut."""

SMALL_TYPES = "fdilq"
"""Types of elements, by NumPy's letters, that every MPI library knows."""


def run_small(
    comm: MPI.Intracomm, schedule: Schedule, flat: np.ndarray, tag: int, scratch: np.ndarray, pause: Callable[[], None]
) -> None:
    """Run a schedule on a flat array of at most `SMALL_BYTES`, with the messages of `collective.Scheduled`.

    Parameters
    ----------
    scratch : ndarray of uint8
        Room for what a step receives; see `scratch_bytes`.
    pause : callable
        Called between polls.
    """
    arrived = scratch.view(flat.dtype)
    for sends, receives, combine, additions in schedule.steps:
        summing, at, arriving = combine == "sum", 0, []
        for peer, start, stop in receives:
            place = arrived[at : at + stop - start] if summing else flat[start:stop]
            arriving.append((comm.Irecv(place, peer, tag), flat[start:stop], place))
            at += stop - start
        leaving = [comm.Isend(flat[start:stop], peer, tag) for peer, start, stop in sends]
        for request, _, _ in arriving:
            while not request.Test():
                pause()
        for request in leaving:
            while not request.Test():
                pause()
        if summing:
            for _, target, place in arriving:
                np.add(target, place, target)
        add_up(flat, additions)


def add_up(flat: np.ndarray, additions: Sequence[Addition]) -> None:
    """Make the additions of a step."""
    for start, stop, source in additions:
        np.add(flat[start:stop], flat[source : source + stop - start], flat[start:stop])


def scratch_bytes(schedule: Schedule, itemsize: int) -> int:
    """Return the bytes of the longest step's messages to be added."""
    lengths = [sum(t.stop - t.start for t in step.receives) for step in schedule.steps if step.combine == "sum"]
    return itemsize * max(lengths, default=0)
