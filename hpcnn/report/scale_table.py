"""The table of a scaling study as a report reads it: `scaling.csv` in the folder of `hpcnn scale`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from hpcnn.errors import DataError
from hpcnn.report.untrusted import clean, is_number

FILE = "scaling.csv"
WORDS = ("mode", "model", "plan", "exchange", "algorithm")
"""Columns that tell one curve from another."""


class Point(NamedTuple):
    """The repeats of one setting on one number of ranks, as medians; None where nothing was measured."""

    ranks: int
    global_batch: float | None
    repeats: int
    step_s: float | None
    fastest_s: float | None
    slowest_s: float | None
    compute_s: float | None
    exposed_comm_s: float | None
    images_per_second: float | None
    memory_bytes: float | None
    bytes_sent: float | None
    predicted_step_s: float | None
    speedup: float | None
    """Images a second over those on the fewest ranks."""
    efficiency: float | None
    """The speed-up over the one that the number of ranks would give."""


class Curve(NamedTuple):
    """One setting over numbers of ranks."""

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
    path, notes = folder / FILE, list[str]()
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = [{str(name): value for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, csv.Error) as error:
        raise DataError(f"report: '{path}' cannot be read: {error}.") from None
    groups: dict[tuple[str, ...], dict[int, list[dict[str, object]]]] = {}
    for row in rows:
        ranks = _number(row.get("ranks"))
        words = tuple(clean(row.get(name) or "") for name in WORDS)
        if ranks is None or not 1 <= ranks <= 1e9:
            notes.append("A line without a number of ranks is left out.")
        elif _number(row.get("step_s")) is None:
            status = clean(row.get("status") or "no step time")
            notes.append(f"{' '.join(filter(None, words))} on {ranks:.0f} ranks was not measured: {status}.")
        else:
            groups.setdefault(words, {}).setdefault(int(ranks), []).append(dict(row))
    constant = [len({words[i] for words in groups}) == 1 for i in range(len(WORDS))]
    curves = []
    for words, by_ranks in groups.items():
        label = " ".join(word for word, same in zip(words, constant, strict=True) if word and not same)
        curves.append(Curve(label or " ".join(filter(None, words)), _points(by_ranks)))
    return ScaleTable(clean(folder.resolve().name), curves, list(dict.fromkeys(notes)))


def _points(by_ranks: dict[int, list[dict[str, object]]]) -> list[Point]:
    points: list[Point] = []
    for ranks, rows in sorted(by_ranks.items()):
        times = _column(rows, "step_s")
        speed = _median(rows, "images_per_second")
        first = points[0] if points else None
        base = first.images_per_second if first else speed
        speedup = speed / base if speed and base else None
        points.append(
            Point(
                ranks=ranks,
                global_batch=_median(rows, "global_batch"),
                repeats=len(rows),
                step_s=median(times),
                fastest_s=min(times),
                slowest_s=max(times),
                compute_s=_median(rows, "compute_s"),
                exposed_comm_s=_median(rows, "exposed_comm_s"),
                images_per_second=speed,
                memory_bytes=_median(rows, "memory_bytes"),
                bytes_sent=_median(rows, "bytes_sent"),
                predicted_step_s=_median(rows, "predicted_step_s"),
                speedup=speedup,
                efficiency=speedup / (ranks / (first.ranks if first else ranks)) if speedup else None,
            )
        )
    return points


def _column(rows: Sequence[dict[str, object]], name: str) -> list[float]:
    return [number for row in rows if (number := _number(row.get(name))) is not None]


def _median(rows: Sequence[dict[str, object]], name: str) -> float | None:
    numbers = _column(rows, name)
    return median(numbers) if numbers else None


def _number(text: object) -> float | None:
    try:
        number = float(str(text))
    except ValueError:
        return None
    return number if is_number(number) and number >= 0 else None
