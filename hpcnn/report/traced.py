"""What a trace says in numbers: one step to draw, the times of layers and ranks, what every collective sends.

Reads what `trace.py` writes. The first recorded step pays for the warm-up of caches and links and does not count,
where there are others.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, median_low
from typing import Any, NamedTuple, TypeGuard

from hpcnn import bounded
from hpcnn.errors import DataError
from hpcnn.report.untrusted import clean, is_number
from hpcnn.timeline import LANES

LARGEST_BYTES = 300_000_000
MOST_LOOKS = 100_000_000
"""Every span is held against every step of its rank: beyond so many times that takes minutes."""
IMAGES = "wait for images"
_OF_LAYER = re.compile(r"(?P<layer>.+) (?P<phase>forward|error|input gradient|weight gradient)(, inside|, border)?")


class TracedSpan(NamedTuple):
    """A span of one rank; seconds on the clock that all ranks of a trace share."""

    name: str
    lane: str
    begin_s: float
    end_s: float
    num_bytes: float | None

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.end_s - self.begin_s


@dataclass
class TracedRank:
    """The spans of one rank, in order of time."""

    name: str
    spans: list[TracedSpan] = field(default_factory=list)

    @cached_property
    def steps(self) -> dict[str, TracedSpan]:
        """The recorded steps by name, in order."""
        return {span.name: span for span in self.spans if span.lane == "step"}

    def within(self, step: TracedSpan) -> list[TracedSpan]:
        """Return what the rank did in the time of a step, which may be another rank's: its waits come last."""
        spans = [s for s in self.spans if s.lane != "step" and s.begin_s < step.end_s and s.end_s > step.begin_s]
        return sorted(spans, key=lambda span: span.lane == "wait")


class RankTime(NamedTuple):
    """Mean seconds of a step on one rank."""

    name: str
    compute_s: float
    message_wait_s: float
    image_wait_s: float
    other_s: float
    """What is neither in a layer nor waited for: bookkeeping between them."""


class LayerTime(NamedTuple):
    """Mean seconds of one layer in a step: on the average rank, and forward and backward on the slowest one."""

    forward_s: float
    backward_s: float
    slowest_s: float


class Sent(NamedTuple):
    """One collective in a step of the average rank."""

    name: str
    times: float
    num_bytes: float | None
    """Sent by a rank; None where it was not recorded."""
    in_flight_s: float


@dataclass
class Trace:
    """The recorded steps of all ranks."""

    ranks: list[TracedRank]
    num_dropped: int = 0

    @cached_property
    def counted(self) -> list[str]:
        """Names of the steps that every rank has, without the first."""
        everywhere = set.intersection(*(set(rank.steps) for rank in self.ranks)) if self.ranks else set()
        names = [name for name in self.ranks[0].steps if name in everywhere] if self.ranks else []
        return names[1:] or names

    def typical_step(self) -> str | None:
        """Return the name of the step whose length on the first rank is the middle one."""
        lengths = {name: self.ranks[0].steps[name].seconds for name in self.counted}
        if not lengths:
            return None
        middle = median_low(lengths.values())
        return next(name for name, seconds in lengths.items() if seconds == middle)

    def rank_times(self) -> list[RankTime]:
        """Return how the mean step passes on every rank."""
        found = []
        for rank in self.ranks:
            parts = [_split(rank, rank.steps[name]) for name in self.counted]
            if parts:
                found.append(RankTime(rank.name, *(mean(values) for values in zip(*parts, strict=True))))
        return found

    def layer_times(self) -> dict[str, LayerTime]:
        """Return the time of every layer, by name."""
        totals: list[dict[tuple[str, bool], float]] = []
        for rank in self.ranks:
            mine: dict[tuple[str, bool], float] = defaultdict(float)
            for span in self._counted_spans(rank, "compute"):
                if found := _OF_LAYER.fullmatch(span.name):
                    mine[found["layer"], found["phase"] == "forward"] += span.seconds / len(self.counted)
            totals.append(mine)
        return {
            name: LayerTime(
                mean(mine.get((name, True), 0.0) for mine in totals),
                mean(mine.get((name, False), 0.0) for mine in totals),
                max(mine.get((name, True), 0.0) + mine.get((name, False), 0.0) for mine in totals),
            )
            for name in dict.fromkeys(name for mine in totals for name, _ in mine)
        }

    def sent(self) -> list[Sent]:
        """Return what every kind of collective sends in a step, the largest first."""
        spans: dict[str, list[TracedSpan]] = defaultdict(list)
        for rank in self.ranks:
            for span in self._counted_spans(rank, "communication"):
                spans[span.name].append(span)
        per_step = len(self.ranks) * len(self.counted)
        found = []
        for name, some in spans.items():
            sizes = [span.num_bytes for span in some if span.num_bytes is not None]
            num_bytes = math.fsum(sizes) / per_step if sizes else None
            seconds = math.fsum(span.seconds for span in some) / per_step
            found.append(Sent(name, len(some) / per_step, num_bytes, seconds))
        return sorted(found, key=lambda one: (-(one.num_bytes or 0.0), one.name))

    def _counted_spans(self, rank: TracedRank, lane: str) -> Iterable[TracedSpan]:
        """Yield the spans of a lane that begin in a step that counts."""
        steps = rank.steps
        bounds = [(steps[name].begin_s, steps[name].end_s) for name in self.counted]
        for span in rank.spans:
            if span.lane == lane and any(begin <= span.begin_s < end for begin, end in bounds):
                yield span


def read_trace(path: Path) -> Trace:
    """Return the trace in a file.

    Raises
    ------
    DataError
        If it is not one.
    """
    try:
        document = bounded.json_value(bounded.text(path, LARGEST_BYTES, "replace"))
        events = [event for event in document["traceEvents"] if isinstance(event, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError("it is not a trace, or only a part of one.") from None
    ranks: dict[int, TracedRank] = {}
    for event in events:
        process = event.get("pid")
        if not isinstance(process, int):
            continue
        if event.get("ph") == "M" and event.get("name") == "process_name":
            name = event["args"].get("name") if isinstance(event.get("args"), dict) else None
            ranks.setdefault(process, TracedRank("")).name = clean(name)
        elif event.get("ph") == "X" and event.get("cat") in LANES:
            span = _span(event)
            if span is not None:
                ranks.setdefault(process, TracedRank(f"rank {process - 1}")).spans.append(span)
    for rank in ranks.values():
        rank.spans.sort(key=lambda span: span.begin_s)
    other = document.get("otherData")
    dropped = other.get("dropped_spans") if isinstance(other, dict) else 0
    trace = Trace([ranks[process] for process in sorted(ranks)], dropped if isinstance(dropped, int) else 0)
    if sum(len(rank.steps) * len(rank.spans) for rank in trace.ranks) > MOST_LOOKS:
        raise DataError("it holds too many steps to be drawn here; open it at https://ui.perfetto.dev.")
    if not trace.counted:
        raise DataError("it holds no step that all ranks have recorded.")
    return trace


def _span(event: dict[str, Any]) -> TracedSpan | None:
    begin, length, args = event.get("ts"), event.get("dur"), event.get("args")
    if not _is_time(begin) or not _is_time(length):
        return None
    size = args.get("bytes") if isinstance(args, dict) else None
    name, lane = clean(event.get("name")), str(event["cat"])
    return TracedSpan(name, lane, begin / 1e6, (begin + length) / 1e6, float(size) if _is_time(size) else None)


def _is_time(value: Any) -> TypeGuard[float]:
    return is_number(value) and 0 <= value < 1e18


def _split(rank: TracedRank, step: TracedSpan) -> tuple[float, float, float, float]:
    """Return the seconds of a step in computing, waiting for messages, waiting for images, and neither."""
    spans = [span for span in rank.within(step) if span.lane in ("compute", "wait")]
    waits = [span for span in spans if span.lane == "wait"]
    images_s = covered([span for span in waits if span.name == IMAGES], step)
    waits_s, busy_s = covered(waits, step), covered(spans, step)
    return busy_s - waits_s, waits_s - images_s, images_s, step.seconds - busy_s


def covered(spans: Sequence[TracedSpan], step: TracedSpan) -> float:
    """Return how many seconds of a step lie in at least one of the spans."""
    total, reached = 0.0, step.begin_s
    for span in sorted(spans, key=lambda span: span.begin_s):
        begin, end = max(span.begin_s, reached), min(span.end_s, step.end_s)
        if end > begin:
            total += end - begin
            reached = end
    return total
