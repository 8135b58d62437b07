"""Collectives on device arrays: staged through page-locked host memory, so that no MPI library needs to know of GPUs.

Each has a mirror of its array on the host and a collective on that. What this rank sends or adds to is copied down
beside the kernels, the collective runs on the mirror, and what has changed is copied up. The engine's polling carries
all three on: nobody waits for a copy. Wire types and schedules are those of host arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcnn.arrays import Array
from hpcnn.comm.collective import Collective
from hpcnn.errors import CommError
from hpcnn.gpu import Copies, Event
from hpcnn.plan.schedules import Schedule

if TYPE_CHECKING:
    from hpcnn.comm.engine import Engine


class Touched(NamedTuple):
    """What a collective needs of an array on this rank, and what it changes there."""

    reads: tuple[slice, ...]
    writes: tuple[slice, ...]


WHOLE = Touched((slice(None),), (slice(None),))


class Staged(Collective):
    """A collective on a device array. From start to done the array belongs to it, as a host array would.

    Parameters
    ----------
    make : callable
        Makes the collective on a flat host array.
    touched : Touched
        What is copied down before it and up after it.
    """

    def __init__(
        self,
        engine: Engine,
        copies: Copies,
        array: Array,
        make: Callable[[np.ndarray], Collective],
        touched: Touched,
    ) -> None:
        check_device_array(array)
        device, host = array.reshape(-1), copies.locked(array.size, array.dtype)
        self._inner = make(host)
        super().__init__(engine, self._inner.label, self._inner.priority, self._inner.traffic)
        self._copies = copies
        self._down = [(device[part], host[part]) for part in touched.reads]
        self._up = [(host[part], device[part]) for part in touched.writes]
        self._copied: Event | None = None
        self._travels = False

    def begin(self) -> None:
        """Begin to copy down, behind the kernels that make the array."""
        super().begin()
        self._copies.after_kernels()  # also where nothing is copied down: a kernel may still read what will change
        for source, target in self._down:
            self._copies.download(source, target)
        self._copied, self._travels = self._copies.event(), False

    def advance(self) -> bool:
        """Carry on whatever is under way, and begin what follows it."""
        if self._copied is not None:
            if not self._copied.done:
                return False
            self._copied = None
            if self._travels:
                self._finish()
                return True
            self._travels = True
            self._inner.begin()
        elif not self._inner.advance():
            return False
        self.num_moved = self._inner.num_moved
        if self._inner.done:
            for source, target in self._up:
                self._copies.upload(source, target)
            self._copied = self._copies.event()
        return True

    def waiting_for(self) -> list[int]:
        """Return the ranks whose messages have not come."""
        return [] if self._inner.done else self._inner.waiting_for()


def touched(schedule: Schedule, *, rounds: bool) -> Touched:
    """Return what a schedule reads and writes; `rounds` says whether what is sent is rounded in place."""
    if any(step.additions for step in schedule.steps):
        raise CommError("comm: additions within an array are made on the host only. Run the schedule on a host array.")
    ends = [end for step in schedule.steps for t in (*step.sends, *step.receives) for end in (t.start, t.stop)]
    cuts = sorted(set(ends))
    number = {cut: index for index, cut in enumerate(cuts)}

    def pieces(transfers: Sequence[tuple[int, int, int]]) -> set[int]:
        return {index for _, start, stop in transfers for index in range(number[start], number[stop])}

    reads: set[int] = set()
    writes: set[int] = set()
    for sends, receives, combine, _ in schedule.steps:
        sent, received = pieces(sends), pieces(receives)
        reads |= sent - writes
        if combine == "sum":
            reads |= received - writes
        writes |= received
        if rounds:
            writes |= sent
    return Touched(_joined(reads, cuts), _joined(writes, cuts))


def _joined(pieces: set[int], cuts: list[int]) -> tuple[slice, ...]:
    """Return neighbouring pieces, each from one cut to the next, as one slice."""
    found: list[slice] = []
    for index in sorted(pieces):
        start, stop = cuts[index : index + 2]
        if found and found[-1].stop == start:
            found[-1] = slice(found[-1].start, stop)
        else:
            found.append(slice(start, stop))
    return tuple(found)


def check_device_array(array: Array) -> None:
    """Raise CommError unless a device array can be summed and stored in place."""
    if array.dtype.kind not in "iuf" or not array.flags.c_contiguous:
        raise CommError(
            f"comm: device array of {array.dtype}, shape {array.shape}; it must hold integers or floats that the host"
            " can add, and be contiguous. Cast or copy it first."
        )
