"""A collective on one array: prepared once, started every step, carried on by whoever polls its engine.

Both kinds are small state machines that never wait: `Scheduled` runs a schedule of ours, `OfLibrary` a request of the
MPI library. A collective belongs to an `Engine`, which makes it, starts it and polls it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcnn.comm import wire
from hpcnn.comm.counters import Traffic
from hpcnn.plan.schedules import Schedule, Transfer

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpcnn.comm.engine import Engine

WINDOW = 2
"""Segments of a step that may be on their way to this rank at once."""


class Collective:
    """One collective of an engine. Made by `Engine.prepare` and its relatives, never directly.

    Attributes
    ----------
    label : str
        What travels, for people: "sum of conv4 .. conv5".
    priority : int
        Of those in flight, the lowest number is served first.
    traffic : Traffic
        What this rank sends in one run.
    index : int
        Number among the engine's prepared collectives, the same on all ranks; -1 for one that runs once.
    num_starts : int
        How often it has been started.
    num_moved : int
        Messages that have left or arrived in this run so far.
    done : bool
        Whether this rank has done its part of the last start.
    started_at, finished_at : float
        Of the last run, seconds of `time.perf_counter`.
    """

    def __init__(self, engine: Engine, label: str, priority: int, traffic: Traffic) -> None:
        self.label = label
        self.priority = priority
        self.traffic = traffic
        self.index = -1
        self.num_starts = 0
        self.num_moved = 0
        self.done = True
        self.started_at = self.finished_at = 0.0
        self._engine = engine

    def start(self) -> None:
        """Begin a run; its arrays belong to it until it is done (collective; ranks may start several in any order)."""
        self._engine.start(self)

    def wait(self) -> None:
        """Return once this rank has done its part, carrying on everything that is in flight meanwhile."""
        if not self.done:
            self._engine.wait_until(lambda: self.done, self.label)

    # -- for the engine ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Post the first messages. The engine holds its lock."""
        self.num_starts += 1
        self.num_moved = 0
        self.done = False
        self.started_at = time.perf_counter()

    def advance(self) -> bool:
        """Do what can be done without waiting; return whether anything moved. The engine holds its lock."""
        raise NotImplementedError

    def waiting_for(self) -> list[int]:
        """Return the ranks whose messages have not come, as far as is known."""
        return []

    def _finish(self) -> None:
        self.finished_at = time.perf_counter()
        self.done = True


class OfLibrary(Collective):
    """A non-blocking collective of the MPI library, on a communicator of its own.

    The library wants such calls in the same order on all ranks of a communicator; ranks may start ours in any order.
    """

    def __init__(
        self,
        engine: Engine,
        begin: Callable[[], MPI.Request],
        end: Callable[[], None],
        label: str,
        priority: int,
        traffic: Traffic,
    ) -> None:
        super().__init__(engine, label, priority, traffic)
        self._begin_request = begin
        self._end = end
        self._request: MPI.Request | None = None

    def begin(self) -> None:
        """Post the library's request."""
        super().begin()
        self._request = self._begin_request()

    def advance(self) -> bool:
        """Test the request, which is also what carries it on."""
        assert self._request is not None
        if not self._request.Test():
            return False
        self._request = None
        self._end()
        self.num_moved += 1
        self._finish()
        return True


class _Cut(NamedTuple):
    """A step of a schedule, cut into messages."""

    sends: Sequence[Transfer]
    receives: Sequence[Transfer]
    sums: bool
    longest: int
    """Elements of the longest message to receive."""
    num_sent: int


class _Arrival(NamedTuple):
    """A message on its way here; it will lie in `slot` of the scratch memory unless it goes straight to its place."""

    request: MPI.Request
    peer: int
    start: int
    stop: int
    slot: int


class Scheduled(Collective):
    """A schedule on an array.

    Messages that are to be added arrive in segments in scratch memory, so that adding one overlaps receiving the next;
    those that are to be stored go straight to their place. With a narrow wire type both go through scratch memory.
    What is sent is rounded in place; `round_result` rounds the rest in the end, where a rank that never sent its result
    must hold the same bits as one that did.
    """

    def __init__(
        self,
        engine: Engine,
        schedule: Schedule,
        array: np.ndarray,
        tag: int,
        *,
        label: str = "",
        priority: int = 0,
        wire_type: str = "fp32",
        round_result: bool = False,
    ) -> None:
        self._narrow = wire_type != "fp32"
        self._round_result = round_result and self._narrow
        self._wire = wire_type
        self._message_size = wire.wire_itemsize(wire_type, array.dtype)
        num_bytes = schedule.num_elements_sent * self._message_size
        super().__init__(engine, label, priority, Traffic(schedule.num_messages, num_bytes))
        self._array = array.reshape(-1)
        self._tag = tag
        self._steps = [self._cut(step.sends, step.receives, step.combine == "sum") for step in schedule.steps]
        self._next = 0
        # Of the current step: messages not yet out; messages on their way here, in order; how many were asked for.
        self._step = _Cut((), (), False, 0, 0)
        self._sends: deque[tuple[MPI.Request, int, int]] = deque()
        self._arriving: deque[_Arrival] = deque()
        self._cursor = 0
        self._incoming: np.ndarray | None = None
        self._outgoing: np.ndarray | None = None

    def begin(self) -> None:
        """Post the messages of the first step."""
        super().begin()
        self._next = 0
        self._step = _Cut((), (), False, 0, 0)
        self.advance()

    def advance(self) -> bool:
        """Store or add what has arrived, and go on to the next step when one is through."""
        before = self.num_moved
        while self._finish_step():
            if self._next == len(self._steps):
                self._give_back()
                if self._round_result:
                    wire.round_in_place(self._array, self._wire)
                self._finish()
                return True
            self._step = self._steps[self._next]
            self._next += 1
            self._begin_step()
        return self.num_moved != before

    def waiting_for(self) -> list[int]:
        """Return the peers of the messages that are next to come."""
        return sorted({arrival.peer for arrival in self._arriving})

    def _cut(self, sends: tuple[Transfer, ...], receives: tuple[Transfer, ...], sums: bool) -> _Cut:
        engine = self._engine
        limit = (engine.segment_bytes if sums or self._narrow else engine.chunk_bytes) // self._message_size or 1
        arrivals = _segments(receives, limit)
        return _Cut(
            _segments(sends, limit),
            arrivals,
            sums,
            max((stop - start for _, start, stop in arrivals), default=0),
            sum(stop - start for _, start, stop in sends),
        )

    def _begin_step(self) -> None:
        """Ask for the first segments of a step and send all of them."""
        engine, step, size = self._engine, self._step, self._message_size
        self._cursor = 0
        if step.receives:
            if step.sums or self._narrow:
                self._incoming = engine.take_scratch(WINDOW * step.longest * size, self._incoming)
            for slot in range(min(WINDOW, len(step.receives))):
                self._receive(slot)
        if not step.sends:
            return
        source, offset = self._array, None
        if self._narrow:
            self._outgoing = engine.take_scratch(step.num_sent * size, self._outgoing)
            source, offset = self._outgoing, 0
        for peer, start, stop in step.sends:
            first, length = start * size, (stop - start) * size
            if offset is not None:
                first, offset = offset, offset + length
                wire.pack(self._array[start:stop], source[first:offset], self._wire)
            self._sends.append((engine.comm.Isend((source, length, first, engine.byte), peer, self._tag), start, stop))

    def _receive(self, slot: int) -> None:
        """Ask for the step's next segment, if there is one."""
        engine, step, size = self._engine, self._step, self._message_size
        if self._cursor == len(step.receives):
            return
        peer, start, stop = step.receives[self._cursor]
        self._cursor += 1
        if step.sums or self._narrow:
            message = (self._incoming, (stop - start) * size, slot * step.longest * size, engine.byte)
        else:
            message = (self._array, (stop - start) * size, start * size, engine.byte)
        self._arriving.append(_Arrival(engine.comm.Irecv(message, peer, self._tag), peer, start, stop, slot))

    def _finish_step(self) -> bool:
        """Store or add what has arrived; return whether nothing of the step is left."""
        arriving = self._arriving
        while arriving:
            request, _, start, stop, slot = arriving[0]
            # A sum must not change elements that are still being sent. (A request that has tested true stays true.)
            if not request.Test() or (self._step.sums and not self._narrow and self._being_sent(start, stop)):
                return False
            arriving.popleft()
            self.num_moved += 1
            if self._step.sums or self._narrow:
                self._unpack(start, stop, slot)
            self._receive(slot)
        return not self._sends or not self._being_sent(0, self._array.size)

    def _unpack(self, start: int, stop: int, slot: int) -> None:
        assert self._incoming is not None
        first, size = slot * self._step.longest * self._message_size, (stop - start) * self._message_size
        message, target = self._incoming[first : first + size], self._array[start:stop]
        combine = wire.unpack_add if self._step.sums else wire.unpack_store
        combine(message, target, self._wire)

    def _being_sent(self, start: int, stop: int) -> bool:
        """Return whether a message out of [start, stop) has not left yet."""
        sends = self._sends
        while sends and sends[0][0].Test():
            sends.popleft()
            self.num_moved += 1
        return bool(sends) and any(first < stop and start < last for _, first, last in sends)

    def _give_back(self) -> None:
        for scratch in (self._incoming, self._outgoing):
            if scratch is not None:
                self._engine.give_scratch(scratch)
        self._incoming = self._outgoing = None


def _segments(transfers: tuple[Transfer, ...], limit: int) -> Sequence[Transfer]:
    """Return the transfers as messages of at most `limit` elements; both sides cut at the same places."""
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
