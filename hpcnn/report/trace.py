"""The timelines of all ranks as one file in the Chrome trace-event format, which https://ui.perfetto.dev opens.

A process is a rank, a thread is a lane of its timeline. The format wants the spans of a thread to nest; where they do
not, as with collectives in flight, the lane becomes several threads.

References
----------
"Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from hpcnn.comm.clock import offset_to_root
from hpcnn.comm.world import World
from hpcnn.errors import ConfigError
from hpcnn.timeline import LANES, Span, Timeline
from hpcnn.train.atomic import replacing

Event: TypeAlias = dict[str, Any]

SIDE_BY_SIDE = {"communication"}
"""Lanes whose spans are equals: one that lies within another is not a part of it."""


class RankSpans(NamedTuple):
    """What one rank brings to the trace."""

    hostname: str
    offset_s: float
    """To be added to its times to get rank 0's."""
    spans: list[Span]
    num_dropped: int


def write_trace(world: World, timeline: Timeline, path: Path) -> None:
    """Write the timelines of all ranks into one file (collective); rank 0 writes, an error is raised everywhere.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    ranks = collect(world, timeline)
    with world.agreeing():
        if ranks is not None:
            write(path, ranks)


def collect(world: World, timeline: Timeline) -> list[RankSpans] | None:
    """Return what all ranks have recorded on rank 0, and None elsewhere (collective)."""
    world.barrier()  # the clocks are compared when all are there, and the watchdog sees who is not
    offset_s = offset_to_root(world.comm)
    mine = RankSpans(world.hostnames[world.rank], offset_s, timeline.spans, timeline.num_dropped)
    return world.gather_obj(mine)


def write(path: Path, ranks: Sequence[RankSpans]) -> None:
    """Write a trace, an event a line; the file is whole or not there.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    about = {"ranks": len(ranks), "dropped_spans": sum(rank.num_dropped for rank in ranks)}
    head = f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about)}, "traceEvents": [\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(head)
            for index, event in enumerate(events(ranks)):
                file.write((",\n" if index else "") + json.dumps(event, separators=(",", ":"), default=_plain))
            file.write("\n]}\n")
    except OSError as error:
        raise ConfigError(
            f"trace: cannot write '{path}': {error.strerror}; the run is not affected."
            " Name a file in a folder where you may write and that has room."
        ) from None


def events(ranks: Sequence[RankSpans]) -> Iterator[Event]:
    """Yield the events of a trace: names first, then the spans of one thread after the other, each in order of time.

    Times are microseconds of rank 0's clock from the first span of all.
    """
    zero_s = min((span.begin_s + rank.offset_s for rank in ranks for span in rank.spans), default=0.0)
    # Perfetto keeps 0 to itself and takes the thread numbered like its process for the main one.
    numbers = itertools.count(len(ranks) + 1)
    for index, rank in enumerate(ranks):
        process = index + 1
        yield _name("process_name", process, 0, name=f"rank {index} ({rank.hostname})")
        yield _name("process_sort_index", process, 0, sort_index=index)
        if rank.num_dropped:
            yield _name("process_labels", process, 0, labels=f"{rank.num_dropped} spans dropped")
        for order, (name, spans) in enumerate(_threads(rank, zero_s)):
            thread = next(numbers)
            yield _name("thread_name", process, thread, name=name)
            yield _name("thread_sort_index", process, thread, sort_index=order)
            for span in spans:
                yield {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.lane,
                    "pid": process,
                    "tid": thread,
                    "ts": span.begin_ns / 1e3,
                    "dur": (span.end_ns - span.begin_ns) / 1e3,
                    "args": span.args,
                }


class _Placed(NamedTuple):
    """A span on the common clock. Whole nanoseconds: rounding must not make neighbours overlap."""

    begin_ns: int
    end_ns: int
    name: str
    lane: str
    args: dict[str, Any]


def _threads(rank: RankSpans, zero_s: float) -> Iterator[tuple[str, list[_Placed]]]:
    """Yield name and spans of every thread that the rank's lanes need."""
    shift_s = rank.offset_s - zero_s
    lanes: dict[str, list[_Placed]] = {lane: [] for lane in LANES}
    for span in rank.spans:
        begin_ns = max(0, round(1e9 * (span.begin_s + shift_s)))
        end_ns = max(begin_ns, round(1e9 * (span.end_s + shift_s)))
        lanes[span.lane].append(_Placed(begin_ns, end_ns, span.name, span.lane, span.args))
    for lane, spans in lanes.items():
        for number, thread in enumerate(lay_out(spans, nested=lane not in SIDE_BY_SIDE), start=1):
            yield (lane if number == 1 else f"{lane} {number}"), thread


def lay_out(spans: Iterable[_Placed], *, nested: bool) -> list[list[_Placed]]:
    """Return the spans in rows, each in the first row that has room.

    Parameters
    ----------
    spans : iterable
        Anything with `begin_ns` and `end_ns`.
    nested : bool
        A span may lie within another of its row. Otherwise spans of a row do not overlap, and there are no more rows
        than spans at any one time.

    Returns
    -------
    list of lists
        In each row spans follow each other by their begin, what contains another before it.
    """
    rows: list[_Row] = []
    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        row = next((row for row in rows if row.has_room(span, nested)), None)
        if row is None:
            rows.append(row := _Row())
        row.spans.append(span)
        row.open_ends.append(span.end_ns)
    return [row.spans for row in rows]


class _Row:
    """Spans in the order of their begin, and the ends of those that are open at the last one, innermost last."""

    def __init__(self) -> None:
        self.spans: list[_Placed] = []
        self.open_ends: list[int] = []

    def has_room(self, span: _Placed, nested: bool) -> bool:
        """Return whether the span can follow; none that is asked about later may begin before it."""
        ends = self.open_ends
        while ends and ends[-1] <= span.begin_ns:
            ends.pop()
        return not ends or (nested and span.end_ns <= ends[-1])


def _plain(value: Any) -> Any:
    """Return what JSON has for a value that it has not: the number in a NumPy scalar, else the words for it."""
    return value.item() if hasattr(value, "item") else str(value)


def _name(kind: str, process: int, thread: int, **args: Any) -> Event:
    event: Event = {"ph": "M", "name": kind, "pid": process, "args": args}
    return event | {"tid": thread} if thread else event
