"""A collective on one array: prepared once, started every step, carried on by whoever polls its engine.

Both kinds are small state machines that never wait: `Scheduled` runs a schedule of ours, `OfLibrary` a request of the
MPI library. A collective belongs to an `Engine`, which makes it, starts it and polls it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcnn.comm import wire
from hpcnn.comm.counters import Traffic
from hpcnn.comm.small import add_up
from hpcnn.errors import CommError
from hpcnn.plan.schedules import Addition, Schedule, Step, Transfer

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpcnn.comm.engine import Engine

WINDOW = 2
"""Messages of a step that may be on their way to, and from, each rank at once."""


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
    """A step of a schedule, cut into messages; those from and to one rank lie together, in order."""

    sends: tuple[tuple[Transfer, ...], ...]
    receives: tuple[tuple[Transfer, ...], ...]
    sums: bool
    longest: int
    """Elements of the longest message."""
    additions: tuple[Addition, ...] = ()


class _Lane:
    """The messages of one step to, or from, one rank: some on their way, the rest waiting."""

    __slots__ = ("first_slot", "flying", "messages", "next")

    def __init__(self, messages: tuple[Transfer, ...], first_slot: int) -> None:
        self.messages = messages
        self.next = 0
        self.flying: deque[tuple[MPI.Request, int, int, int]] = deque()  # request, start, stop, slot
        self.first_slot = first_slot

    def slot(self) -> int:
        """Return the place in scratch memory for the next message."""
        return self.first_slot + self.next % WINDOW

    def concerns(self, start: int, stop: int) -> bool:
        """Return whether a message that has not left or arrived yet has elements of [start, stop)."""
        return any(first < stop and start < last for _, first, last, _ in self.flying) or any(
            message.start < stop and start < message.stop for message in self.messages[self.next :]
        )


class Scheduled(Collective):
    """A schedule on an array.

    Long messages travel in segments, few at a time, so that adding one overlaps receiving the next and what is more
    urgent can pass: on some networks a message waits for all that was sent to the same rank before. What is to be added
    arrives in scratch memory; what is to be stored goes straight to its place. With a narrow wire type both directions
    go through scratch memory. What is sent is rounded in place; `round_result` rounds the rest in the end, where a rank
    that never sent its result must hold the same bits as one that did.
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
        self._steps = [self._cut(step) for step in schedule.steps]
        self._next = 0
        self._step = _NOTHING
        self._leaving: list[_Lane] = []
        self._arriving: list[_Lane] = []
        self._incoming: np.ndarray | None = None
        self._outgoing: np.ndarray | None = None

    def begin(self) -> None:
        """Post the messages of the first step."""
        super().begin()
        self._next = 0
        self._step = _NOTHING
        self.advance()

    def advance(self) -> bool:
        """Store or add what has arrived, and go on to the next step when one is through."""
        before = self.num_moved
        while self._finish_step():
            add_up(self._array, self._step.additions)
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
        return sorted({lane.messages[0].peer for lane in self._arriving if lane.flying})

    def _cut(self, step: Step) -> _Cut:
        limit = self._engine.segment_bytes // self._message_size or 1
        away, home = _lanes(step.sends, limit), _lanes(step.receives, limit)
        longest = max((stop - start for lane in (*away, *home) for _, start, stop in lane), default=0)
        return _Cut(away, home, step.combine == "sum", longest, step.additions)

    def _begin_step(self) -> None:
        """Ask for the first segments of a step and send its first ones."""
        engine, step, window = self._engine, self._step, WINDOW * self._step.longest * self._message_size
        self._leaving = [_Lane(messages, WINDOW * index) for index, messages in enumerate(step.sends)]
        self._arriving = [_Lane(messages, WINDOW * index) for index, messages in enumerate(step.receives)]
        if step.receives and (step.sums or self._narrow):
            self._incoming = engine.scratch.take(window * len(step.receives), self._incoming)
        if step.sends and self._narrow:
            self._outgoing = engine.scratch.take(window * len(step.sends), self._outgoing)
        for lane in self._arriving:
            self._receive(lane)
        for lane in self._leaving:
            self._send(lane)

    def _receive(self, lane: _Lane) -> None:
        """Ask for as many of a rank's messages as may be on their way."""
        engine, step, size = self._engine, self._step, self._message_size
        while len(lane.flying) < WINDOW and lane.next < len(lane.messages):
            peer, start, stop = lane.messages[lane.next]
            slot = lane.slot()
            if step.sums or self._narrow:
                message = (self._incoming, (stop - start) * size, slot * step.longest * size, engine.byte)
            else:
                message = (self._array, (stop - start) * size, start * size, engine.byte)
            lane.flying.append((engine.comm.Irecv(message, peer, self._tag), start, stop, slot))
            lane.next += 1

    def _send(self, lane: _Lane) -> None:
        """Send as many of a rank's messages as may be on their way."""
        engine, size = self._engine, self._message_size
        while len(lane.flying) < WINDOW and lane.next < len(lane.messages):
            peer, start, stop = lane.messages[lane.next]
            slot, length = lane.slot(), (stop - start) * size
            if self._narrow:
                assert self._outgoing is not None
                first = slot * self._step.longest * size
                wire.pack(self._array[start:stop], self._outgoing[first : first + length], self._wire)
                message = (self._outgoing, length, first, engine.byte)
            else:
                message = (self._array, length, start * size, engine.byte)
            lane.flying.append((engine.comm.Isend(message, peer, self._tag), start, stop, slot))
            lane.next += 1

    def _finish_step(self) -> bool:
        """Send, store and add what can be; return whether nothing of the step is left."""
        left = False
        for lane in self._leaving:
            self._see_off(lane)
        for lane in self._arriving:
            flying = lane.flying
            while flying:
                request, start, stop, slot = flying[0]
                # A sum must not change what is still to be sent. (A request that has tested true stays true.)
                if not request.Test() or (self._step.sums and self._to_be_sent(start, stop)):
                    left = True
                    break
                flying.popleft()
                self.num_moved += 1
                if self._step.sums or self._narrow:
                    self._unpack(start, stop, slot)
                self._receive(lane)
        return not left and not any(lane.flying for lane in self._leaving)

    def _see_off(self, lane: _Lane) -> None:
        """Forget the messages of a lane that have left and send more."""
        flying = lane.flying
        while flying and flying[0][0].Test():
            flying.popleft()
            self.num_moved += 1
            self._send(lane)

    def _to_be_sent(self, start: int, stop: int) -> bool:
        """Return whether elements of [start, stop) have not left yet."""
        for lane in self._leaving:
            self._see_off(lane)
        return any(lane.concerns(start, stop) for lane in self._leaving)

    def _unpack(self, start: int, stop: int, slot: int) -> None:
        assert self._incoming is not None
        first, size = slot * self._step.longest * self._message_size, (stop - start) * self._message_size
        message, target = self._incoming[first : first + size], self._array[start:stop]
        combine = wire.unpack_add if self._step.sums else wire.unpack_store
        combine(message, target, self._wire)

    def _give_back(self) -> None:
        for scratch in (self._incoming, self._outgoing):
            if scratch is not None:
                self._engine.scratch.give(scratch)
        self._incoming = self._outgoing = None
        self._leaving, self._arriving = [], []


_NOTHING = _Cut((), (), False, 0)


def _lanes(transfers: tuple[Transfer, ...], limit: int) -> tuple[tuple[Transfer, ...], ...]:
    """Return the messages to or from each rank, at most `limit` elements each; both sides cut at the same places."""
    by_peer: dict[int, list[Transfer]] = {}
    for peer, start, stop in transfers:
        by_peer.setdefault(peer, []).extend(
            Transfer(peer, first, min(first + limit, stop)) for first in range(start, stop, limit)
        )
    return tuple(map(tuple, by_peer.values()))


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


def check_fits(schedule: Schedule, array: np.ndarray) -> None:
    """Raise CommError unless `array` can be worked on in place and is as long as the schedule says."""
    check_array(array)
    if array.size != schedule.count:
        raise CommError(
            f"comm: array (={array.size} elements) and schedule (={schedule.count} elements) must be equally long."
        )
