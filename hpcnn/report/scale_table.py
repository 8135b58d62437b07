"""The table of a scaling study as a report reads it: `scaling.csv` in the folder of `hpcnn scale`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TypeAlias

from hpcnn import bounded
from hpcnn.errors import DataError
from hpcnn.report.untrusted import clean, is_number

Row: TypeAlias = dict[str, object]

FILE = "scaling.csv"
WORDS = ("mode", "model", "plan", "exchange", "algorithm")
"""Columns that tell one curve from another."""


LARGEST_BYTES = 64 << 20
MOST_CURVES, MOST_POINTS, MOST_NOTES = 50, 200, 10


class Point(NamedTuple):
    """The repeats of one setting on one number of ranks, as means; None where nothing is known."""

    ranks: int
    global_batch: float | None
    repeats: int
    step_s: float
    fastest_s: float
    slowest_s: float
    compute_s: float | None
    exposed_comm_s: float | None
    images_per_second: float | None
    memory_bytes: float | None
    """On the rank with most, in the repeat with most."""
    bytes_sent: float | None
    predicted_step_s: float | None
    speedup: float | None = None
    """Images a second over those of the base, times the base's ranks: the fastest point of the same mode on the fewest
    ranks, as `hpcnn scale` has it."""

    @property
    def efficiency(self) -> float | None:
        """Speed-up over the number of ranks."""
        return None if self.speedup is None else self.speedup / self.ranks


class Curve(NamedTuple):
    """One setting over numbers of ranks."""

    mode: str
    label: str
    points: list[Point]


class ScaleTable(NamedTuple):
    """A scaling study."""

    name: str
    curves: list[Curve]
    notes: list[str]


def read_scale_table(folder: Path) -> ScaleTable:
    """Return the study in a folder.

    Raises
    ------
    DataError
        If its table cannot be read.
    """
    path, notes = folder / FILE, dict[str, None]()
    try:
        lines = io.StringIO(bounded.text(path, LARGEST_BYTES, "replace"), newline="")
        rows: list[Row] = [{str(name): value for name, value in row.items()} for row in csv.DictReader(lines)]
    except (OSError, csv.Error) as error:
        raise DataError(f"report: '{path}' cannot be read: {error}.") from None
    groups: dict[tuple[str, ...], dict[int, list[Row]]] = {}
    for row in rows:
        ranks = _number(row.get("ranks"))
        words = tuple(clean(row.get(name) or "") for name in WORDS)
        if ranks is None or not 1 <= ranks <= 1e9:
            notes["A line without a number of ranks is left out."] = None
        elif not _number(row.get("step_s")):
            why = ": ".join(clean(row[name]) for name in ("status", "reason") if row.get(name)) or "no step time"
            notes[f"{' '.join(filter(None, words))} on {ranks:.0f} ranks was not measured ({why})."] = None
        else:
            groups.setdefault(words, {}).setdefault(int(ranks), []).append(row)
    if len(groups) > MOST_CURVES or any(len(by_ranks) > MOST_POINTS for by_ranks in groups.values()):
        raise DataError(
            f"report: '{path}' has {len(groups)} settings; at most {MOST_CURVES} can be drawn, on {MOST_POINTS} numbers"
            " of ranks each. Leave some out of the table."
        )
    told = list(notes)[:MOST_NOTES] + ([f"And {len(notes) - MOST_NOTES} more."] if len(notes) > MOST_NOTES else [])
    return ScaleTable(clean(folder.resolve().name), _curves(groups), told)


def _curves(groups: dict[tuple[str, ...], dict[int, list[Row]]]) -> list[Curve]:
    constant = [len({words[i] for words in groups}) == 1 for i in range(len(WORDS))]
    curves = []
    for words, by_ranks in groups.items():
        label = " ".join(word for word, same in zip(words, constant, strict=True) if word and not same)
        points = [_point(ranks, rows) for ranks, rows in sorted(by_ranks.items())]
        curves.append(Curve(words[0], label or " ".join(filter(None, words)), points))
    return [curve for mode in dict.fromkeys(words[0] for words in groups) for curve in _based(mode, curves)]


def _based(mode: str, curves: Sequence[Curve]) -> list[Curve]:
    """Return the curves of a mode with their speed-ups; a lone point on the fewest ranks is where all others begin."""
    mine = [curve for curve in curves if curve.mode == mode]
    base = min(
        (point for curve in mine for point in curve.points),
        key=lambda point: (point.ranks, -(point.images_per_second or 0.0)),
    )
    if len(mine) > 1 and sum(curve.points[0].ranks == base.ranks for curve in mine) == 1:
        own = next(curve for curve in mine if curve.points[0] is base)
        others = [Curve(mode, curve.label, [base, *curve.points]) for curve in mine if curve is not own]
        mine = others if own.points == [base] else [own, *others]
    return [
        Curve(mode, label, [point._replace(speedup=_speedup(point, base)) for point in points])
        for _, label, points in mine
    ]


def _speedup(point: Point, base: Point) -> float | None:
    if not point.images_per_second or not base.images_per_second:
        return None
    return base.ranks * point.images_per_second / base.images_per_second


def _point(ranks: int, rows: Sequence[Row]) -> Point:
    times, batch = _column(rows, "step_s"), _mean(rows, "global_batch")
    return Point(
        ranks=ranks,
        global_batch=batch,
        repeats=len(rows),
        step_s=fmean(times),
        fastest_s=min(times),
        slowest_s=max(times),
        compute_s=_mean(rows, "compute_s"),
        exposed_comm_s=_mean(rows, "exposed_comm_s"),
        images_per_second=batch / fmean(times) if batch else _mean(rows, "images_per_second"),
        memory_bytes=max(_column(rows, "memory_bytes"), default=None),
        bytes_sent=_mean(rows, "bytes_sent"),
        predicted_step_s=_mean(rows, "predicted_step_s"),
    )


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [number for row in rows if (number := _number(row.get(name))) is not None]


def _mean(rows: Sequence[Row], name: str) -> float | None:
    numbers = _column(rows, name)
    return fmean(numbers) if numbers else None


def _number(text: object) -> float | None:
    try:
        number = float(str(text))
    except ValueError:
        return None
    return number if is_number(number) and number >= 0 else None
