"""What one rank did when: named spans of time, kept in memory until they are written as a trace.

The calls stay in the code for good. Whatever is worth seeing says so to a `Timeline`; `OFF`, the default everywhere,
records nothing and costs a fraction of a microsecond a call.
"""

from __future__ import annotations

import math
import threading
import time
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

Lane: TypeAlias = Literal["step", "compute", "wait", "communication", "input"]
"""Where a span is shown.

"step", "compute" and "wait" are of the thread that trains: its steps, its arithmetic, and the time it is blocked on
other ranks or on images. "input" is of the thread that reads images. Spans of these lanes may contain each other.
"communication" has the collectives in flight, whoever drives them; these may overlap in any way.
"""
LANES: tuple[Lane, ...] = get_args(Lane)

MAX_SPANS = 200_000
"""Some hundred steps of a deep network; about 100 MB."""


class Span(NamedTuple):
    """Something that took time; `begin_s` and `end_s` are of `time.perf_counter`, which every node starts anew."""

    name: str
    lane: Lane
    begin_s: float
    end_s: float
    args: dict[str, Any]
    """What else there is to say, such as layer, bytes or algorithm: values that JSON has."""


class Recording(Protocol):
    """What `Timeline.span` and `Timeline.step` return: a context manager that may be thrown away."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Marks(Protocol):
    """Ranges of a profiler that runs beside, and the device whose work spans are to contain."""

    def push(self, name: str) -> None:
        """Begin a range, inside those that have begun."""

    def pop(self) -> None:
        """End the range that began last."""

    def synchronise(self) -> None:
        """Return once the device has done what it was asked to."""


class Timeline:
    """The spans of one rank. Any thread may add some.

    On a device computation is only launched, and a span would show how long that took: while spans of the lane
    "compute" are recorded, the device is waited for at their ends. Recorded steps are slower for it.

    Parameters
    ----------
    num_steps : int, optional
        Record until so many steps are over. Collectives that they have started are recorded to their end. 0: record
        nothing; left out: record all.
    max_spans : int
        Keep so many spans at most, so that a long run does not fill the memory; the rest is counted.

    Attributes
    ----------
    recording : bool
        Whether a span that begins now is kept. For code that would have to compute what it passes.
    num_dropped : int
        Spans for which there was no room.
    marks : Marks or None
        Told of every span, also of those that are not recorded; None on the CPU.
    """

    __slots__ = ("_lock", "_spans", "_steps_left", "_until_s", "marks", "max_spans", "num_dropped", "recording")

    def __init__(self, *, num_steps: int | None = None, max_spans: int = MAX_SPANS) -> None:
        self.max_spans = max_spans
        self.num_dropped = 0
        self.marks: Marks | None = None
        self.recording = num_steps is None or num_steps > 0
        self._steps_left = math.inf if num_steps is None else num_steps
        # Spans that begin later are not kept: the one test that `add` makes when nothing is recorded.
        self._until_s = math.inf if self.recording else -math.inf
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    @property
    def spans(self) -> list[Span]:
        """A copy of what has been recorded, in the order in which it ended."""
        with self._lock:
            return list(self._spans)

    def span(self, name: str, lane: Lane, **args: Any) -> Recording:
        """Return a context manager that records its block; a block that raises is recorded too."""
        marks = self.marks
        if not self.recording:
            return _NOTHING if marks is None else _Mark(marks, name)
        return _Block(self, name, lane, args) if marks is None else _MarkedBlock(self, name, lane, args)

    def add(self, name: str, lane: Lane, begin_s: float, end_s: float, **args: Any) -> None:
        """Record a span that is over; its times are of `time.perf_counter`."""
        if begin_s <= self._until_s:
            self._keep(Span(name, lane, begin_s, end_s, args))

    def step(self, number: int) -> Recording:
        """Return a context manager that records its block as a step and stops recording after the last one wanted."""
        marked = self.recording or self.marks is not None
        return _StepBlock(self, f"step {number}", "step", {}) if marked else _NOTHING

    def stop(self) -> None:
        """Record no span that begins from now on. There is no way back."""
        if self.recording:
            self.recording, self._until_s = False, time.perf_counter()

    def _keep(self, span: Span) -> None:
        with self._lock:
            if len(self._spans) < self.max_spans:
                self._spans.append(span)
            else:
                self.num_dropped += 1

    def _end_step(self) -> None:
        self._steps_left -= 1
        if self._steps_left <= 0:
            self.stop()


class _Block:
    __slots__ = ("_args", "_begin_s", "_lane", "_name", "_timeline")

    def __init__(self, timeline: Timeline, name: str, lane: Lane, args: dict[str, Any]) -> None:
        self._timeline, self._name, self._lane, self._args = timeline, name, lane, args

    def __enter__(self) -> None:
        self._begin_s = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._timeline._keep(Span(self._name, self._lane, self._begin_s, time.perf_counter(), self._args))


class _Mark:
    __slots__ = ("_marks", "_name")

    def __init__(self, marks: Marks, name: str) -> None:
        self._marks, self._name = marks, name

    def __enter__(self) -> None:
        self._marks.push(self._name)

    def __exit__(self, *exception: object) -> None:
        self._marks.pop()


class _MarkedBlock(_Block):
    __slots__ = ("_marks", "_recorded")

    def __enter__(self) -> None:
        self._marks, self._recorded = self._timeline.marks, self._timeline.recording
        if self._marks is not None:
            self._marks.push(self._name)
        super().__enter__()

    def __exit__(self, *exception: object) -> None:
        if self._marks is not None:
            if self._recorded and self._lane == "compute":
                self._marks.synchronise()
            self._marks.pop()
        if self._recorded:
            super().__exit__(*exception)


class _StepBlock(_MarkedBlock):
    __slots__ = ()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self._recorded:
            self._timeline._end_step()


class _Nothing:
    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


_NOTHING = _Nothing()

OFF = Timeline(num_steps=0)
"""Records nothing; what code that offers spans holds until it is given a timeline."""
