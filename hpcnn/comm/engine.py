"""The engine: runs a schedule on an array over MPI, without ever blocking inside MPI.

A started schedule is a small state machine, `Running`. Whoever holds it calls `advance` until it says it is done: here
the caller itself, with short pauses; a background thread may do the same.

Messages that are to be added arrive in segments, so that adding one overlaps receiving the next and the scratch memory
stays small. Both sides cut the same transfer at the same places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpcnn import arrays
from hpcnn.comm.counters import Traffic
from hpcnn.comm.library import load, node_share
from hpcnn.comm.wait import Patience
from hpcnn.errors import CommError
from hpcnn.plan.schedules import Schedule, Step, Transfer

if TYPE_CHECKING:
    from mpi4py import MPI

SEGMENT_BYTES = 4 << 20
"""Messages to be added are cut here. Shorter segments cost more waiting, longer ones scratch memory and overlap."""

CHUNK_BYTES = 1 << 30
"""Messages to be stored are cut here: MPI counts in 31 bits."""

WINDOW = 2
"""Segments of a step that may be on their way to this rank at once."""


class Engine:
    """Runs schedules among the ranks of a communicator (collective to create and to free).

    The engine owns a duplicate of `comm`, so its messages never meet those of anyone else. All ranks must start the
    same schedules in the same order; each start draws the next tag, so several may be in flight. One engine serves one
    thread.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    segment_bytes, chunk_bytes : int
        Longest message to be added and to be stored; equal on all ranks.
    """

    def __init__(
        self, comm: MPI.Intracomm, *, segment_bytes: int = SEGMENT_BYTES, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        mpi = load()
        if comm.Is_inter():
            raise CommError(
                "comm: an intercommunicator has two groups of ranks; collectives need one. Merge() it first."
            )
        self.comm = comm.Dup()
        self.rank: int = self.comm.rank
        self.size: int = self.comm.size
        self.segment_bytes = segment_bytes
        self.chunk_bytes = chunk_bytes
        self.patience = Patience(core_each=node_share(self.comm).core_each)
        self.byte = mpi.BYTE
        self._num_tags = int(self.comm.Get_attr(mpi.TAG_UB) or 32767) + 1
        self._sequence = 0
        self._num_messages = 0
        self._num_bytes = 0
        self._free_scratch: list[np.ndarray] = []

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent through this engine so far."""
        return Traffic(self._num_messages, self._num_bytes)

    def run(self, schedule: Schedule, array: np.ndarray) -> None:
        """Run a schedule in place on `array` and return when this rank has done its part (collective).

        Parameters
        ----------
        schedule : Schedule
            This rank's schedule, for as many elements as `array` has.
        array : ndarray
            C-contiguous and writable, of any shape and number type; equal types on all ranks.

        Raises
        ------
        CommError
            If the array is not as above.
        """
        running = self.start(schedule, array)
        patience = self.patience
        patience.reset()
        seen = 0
        while not running.advance():
            if running.num_done != seen:
                seen = running.num_done
                patience.reset()
            patience.pause()

    def start(self, schedule: Schedule, array: np.ndarray) -> Running:
        """Return the schedule as a state machine (collective); `array` belongs to it until it is done."""
        check_array(array)
        if array.size != schedule.count:
            raise CommError(
                f"comm: array (={array.size} elements) and schedule (={schedule.count} elements) must be equally long."
            )
        tag = self._sequence
        self._sequence = (tag + 1) % self._num_tags
        self.count(schedule.num_messages, schedule.num_elements_sent * array.itemsize)
        return Running(self, schedule, array.reshape(-1), tag)

    def count(self, num_messages: int, num_bytes: int) -> None:
        """Add to what this rank has sent."""
        self._num_messages += num_messages
        self._num_bytes += num_bytes

    def take_scratch(self, num_bytes: int, held: np.ndarray | None = None) -> np.ndarray:
        """Return at least `num_bytes` bytes of scratch memory: `held`, or old memory, where that is large enough."""
        if held is not None and held.nbytes >= num_bytes:
            return held
        scratch = self._free_scratch.pop() if self._free_scratch else held
        if scratch is None or scratch.nbytes < num_bytes:
            scratch = arrays.empty(1 << max(12, (num_bytes - 1).bit_length()), np.uint8)
        return scratch

    def give_scratch(self, scratch: np.ndarray) -> None:
        """Take back memory lent by `take_scratch`."""
        self._free_scratch.append(scratch)

    def free(self) -> None:
        """Free the engine's communicator (collective)."""
        self.comm.Free()


class Running:
    """A schedule in progress on one array. Made by `Engine.start`.

    Attributes
    ----------
    num_done : int
        Messages that have left or arrived so far; as long as it grows, more will soon follow.
    """

    __slots__ = (
        "_array", "_arriving", "_cursor", "_engine", "_itemsize", "_scratch", "_segments", "_sends", "_slot_size",
        "_steps", "_summing", "_tag", "num_done",
    )  # fmt: skip

    def __init__(self, engine: Engine, schedule: Schedule, array: np.ndarray, tag: int) -> None:
        self.num_done = 0
        self._engine = engine
        self._array = array
        self._itemsize: int = array.itemsize
        self._tag = tag
        self._steps = iter(schedule.steps)
        self._scratch: np.ndarray | None = None
        # Of the current step: messages not yet out; segments on their way here, in order; all segments to receive,
        # and how many of them have been asked for.
        self._sends: deque[tuple[MPI.Request, int, int]] = deque()
        self._arriving: deque[tuple[MPI.Request, int, int, int]] = deque()
        self._segments: Sequence[Transfer] = ()
        self._cursor = 0
        self._summing = False
        self._slot_size = 0

    def advance(self) -> bool:
        """Do what can be done without waiting; return whether the whole schedule is done."""
        while self._finish_step():
            step = next(self._steps, None)
            if step is None:
                if self._scratch is not None:
                    self._engine.give_scratch(self._scratch)
                    self._scratch = None
                return True
            self._begin(step)
        return False

    def _begin(self, step: Step) -> None:
        """Ask for the first segments of a step and send all of them."""
        engine, array, size = self._engine, self._array, self._itemsize
        sends, receives, combine = step
        self._summing = combine == "sum"
        limit = (engine.segment_bytes if self._summing else engine.chunk_bytes) // size or 1
        if receives:
            self._segments, self._cursor = _cut(receives, limit), 0
            if self._summing:
                self._slot_size = max([stop - start for _, start, stop in self._segments])
                self._scratch = engine.take_scratch(WINDOW * self._slot_size * size, self._scratch)
            for slot in range(min(WINDOW, len(self._segments))):
                self._receive(slot)
        for peer, start, stop in _cut(sends, limit):
            message = (array, (stop - start) * size, start * size, engine.byte)
            self._sends.append((engine.comm.Isend(message, peer, self._tag), start, stop))

    def _receive(self, slot: int) -> None:
        """Ask for the step's next segment, if there is one; one to be added goes to a slot of the scratch memory."""
        if self._cursor == len(self._segments):
            return
        engine, size = self._engine, self._itemsize
        peer, start, stop = self._segments[self._cursor]
        self._cursor += 1
        if self._summing:
            message = (self._scratch, (stop - start) * size, slot * self._slot_size * size, engine.byte)
        else:
            message = (self._array, (stop - start) * size, start * size, engine.byte)
        self._arriving.append((engine.comm.Irecv(message, peer, self._tag), start, stop, slot))

    def _finish_step(self) -> bool:
        """Store or add what has arrived; return whether nothing of the step is left."""
        arriving = self._arriving
        while arriving:
            request, start, stop, slot = arriving[0]
            # A sum must not change elements that are still being sent. (A request that has tested true stays true.)
            if not request.Test() or (self._summing and self._being_sent(start, stop)):
                return False
            arriving.popleft()
            self.num_done += 1
            if self._summing:
                self._add(start, stop, slot)
            self._receive(slot)
        return not self._sends or not self._being_sent(0, self._array.size)

    def _add(self, start: int, stop: int, slot: int) -> None:
        first, size = slot * self._slot_size * self._itemsize, (stop - start) * self._itemsize
        arrived = self._scratch[first : first + size].view(self._array.dtype)  # type: ignore[index]
        target = self._array[start:stop]
        np.add(target, arrived, out=target)

    def _being_sent(self, start: int, stop: int) -> bool:
        """Return whether a message out of [start, stop) has not left yet."""
        sends = self._sends
        while sends and sends[0][0].Test():
            sends.popleft()
            self.num_done += 1
        return bool(sends) and any(first < stop and start < last for _, first, last in sends)


def check_array(array: np.ndarray) -> None:
    """Raise CommError unless `array` can be summed and stored in place."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iufc" or not array.dtype.isnative:
        what = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise CommError(f"comm: cannot exchange {what}; it must be a NumPy array of native integers or floats.")
    flags = array.flags
    if not (flags.c_contiguous and flags.writeable):
        raise CommError(
            f"comm: array of shape {array.shape} is not contiguous or not writable; collectives work in place."
            " Pass a copy: np.array(x, order='C')."
        )


def _cut(transfers: tuple[Transfer, ...], limit: int) -> Sequence[Transfer]:
    """Return the transfers as messages of at most `limit` elements."""
    for _, start, stop in transfers:
        if stop - start > limit:
            break
    else:
        return transfers  # nearly always
    return [
        Transfer(peer, first, min(first + limit, stop))
        for peer, start, stop in transfers
        for first in range(start, stop, limit)
    ]
