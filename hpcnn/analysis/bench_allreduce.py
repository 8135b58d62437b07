"""How fast each all-reduce algorithm is on these ranks, message size by message size: measured, and as predicted.

Besides hpcnn's own algorithms "mpi" is the library's, and "auto" the one that `plan.choice` takes at each size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hpcnn.comm.collectives import allreduce
from hpcnn.comm.world import World
from hpcnn.plan.choice import allreduce_algorithm, allreduce_algorithms
from hpcnn.plan.machine import DEFAULT, Machine
from hpcnn.plan.pricing import allreduce_seconds

SIZES = tuple(4 << shift for shift in range(0, 27, 2))
"""Message sizes in bytes: 4 B to 256 MiB, each four times the one before."""

FLOAT_BYTES = 4
SECONDS_PER_SIZE = 2.0
TURNS = (3, 60)
"""Turns of each algorithm at each size, at least and at most."""

BATCH_S = 0.02
MOST_IN_BATCH = 200
"""Short all-reduces follow each other in batches of about `BATCH_S`: how the ranks leave a barrier matters less."""


@dataclass(frozen=True, kw_only=True)
class AllreduceTime:
    """One algorithm at one message size. Times are of the slowest rank."""

    num_ranks: int
    num_bytes: int
    algorithm: str
    """Of ours, "mpi" or "auto"."""
    runs: str
    """What was run under that name; for "auto" the algorithm that it takes here."""
    repeats: int
    times_s: tuple[float, ...]
    """Seconds of one all-reduce in each turn; turn i of all algorithms ran at about the same time."""
    median_s: float
    fastest_s: float
    bytes_per_s: float
    """Algorithmic bandwidth: size of the array by median time."""
    predicted_s: float | None
    """Price of the schedules; None for "mpi"."""

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values, for a JSON line."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How good choice and prediction were over all sizes; each worst with the size in bytes where it was."""

    auto_by_best: float
    auto_by_best_bytes: int
    auto_by_mpi: float | None
    auto_by_mpi_bytes: int | None
    median_error: float
    """Of |predicted / measured - 1| over our algorithms and all sizes."""
    max_error: float
    max_error_at: str


def bench_allreduce(
    world: World,
    sizes: Sequence[int] = SIZES,
    algorithms: Sequence[str] | None = None,
    repeats: int | None = None,
    *,
    machine: Machine | None = None,
    seconds: float = SECONDS_PER_SIZE,
) -> list[AllreduceTime]:
    """Return the times of every algorithm at every size, equal on all ranks (collective).

    The algorithms take turns, forwards and backwards, so that a disturbance meets all of them alike. The ranks start
    each turn together; it lasts as long as its slowest rank.

    Parameters
    ----------
    world : World
        The ranks.
    sizes : sequence of int
        Message sizes in bytes, multiples of 4: the arrays are float32.
    algorithms : sequence of str, optional
        Names that `comm.allreduce` takes. Default: those that apply to these nodes, "mpi" and "auto".
    repeats : int, optional
        Turns of each algorithm at each size. Default: as many as `seconds` allows, within `TURNS`.
    machine : Machine, optional
        What "auto" goes by, and the predictions. Default: the built-in machine.
    seconds : float
        About how long a size may take.
    """
    machine = machine or DEFAULT
    nodes = world.engine.nodes
    algorithms = algorithms or (*allreduce_algorithms(nodes), "mpi", "auto")
    rows = []
    for num_bytes in sizes:
        chosen = allreduce_algorithm(num_bytes, world.size, machine, nodes)
        names = {name: chosen if name == "auto" else name for name in algorithms}
        times = _measure(world, num_bytes, names, repeats, seconds)
        for name, runs in names.items():
            price = allreduce_seconds(runs, num_bytes // FLOAT_BYTES, machine, nodes) if runs != "mpi" else None
            rows.append(_row(world.size, num_bytes, name, runs, times[name], price))
    return rows


def summarise(rows: Sequence[AllreduceTime]) -> Summary | None:
    """Return how good choice and prediction were, or None without rows of "auto" and an algorithm of ours.

    What was timed as "auto" and what was timed under the name of the algorithm it took count as one: the same was run.
    """
    by_best, by_mpi, errors = [], [], []
    for num_bytes in dict.fromkeys(row.num_bytes for row in rows):
        here = {row.algorithm: row for row in rows if row.num_bytes == num_bytes}
        ours = [row for row in here.values() if row.algorithm not in ("mpi", "auto")]
        errors += [
            (abs(row.predicted_s / row.median_s - 1.0), f"{row.algorithm} at {size_text(num_bytes)}")
            for row in ours
            if row.predicted_s is not None
        ]
        if not ours or "auto" not in here:
            continue
        auto = here["auto"]
        auto_s = statistics.median([t for row in here.values() if row.runs == auto.runs for t in row.times_s])
        best_s = min([auto_s, *(row.median_s for row in ours if row.runs != auto.runs)])
        by_best.append((auto_s / best_s, num_bytes))
        if "mpi" in here:
            by_mpi.append((auto_s / here["mpi"].median_s, num_bytes))
    if not by_best or not errors:
        return None
    worst_mpi = max(by_mpi, default=(None, None))
    return Summary(
        auto_by_best=max(by_best)[0],
        auto_by_best_bytes=max(by_best)[1],
        auto_by_mpi=worst_mpi[0],
        auto_by_mpi_bytes=worst_mpi[1],
        median_error=statistics.median(error for error, _ in errors),
        max_error=max(errors)[0],
        max_error_at=max(errors)[1],
    )


def size_text(num_bytes: int) -> str:
    """Return a size as people write it: 65536 -> "64 KiB"."""
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << shift:
            return f"{num_bytes / (1 << shift):g} {unit}"
    return f"{num_bytes} B"


def _measure(
    world: World, num_bytes: int, names: dict[str, str], repeats: int | None, seconds: float
) -> dict[str, list[float]]:
    """Return the seconds of an all-reduce under every name, turn by turn, equal on all ranks (collective)."""
    array = np.zeros(num_bytes // FLOAT_BYTES, np.float32)
    # The first turn warms up. Where it takes long it counts: connections and memory are a small part of it.
    times = {name: [_one_batch(world, array, runs, 1)] for name, runs in names.items()}
    first_s = sum(one for (one,) in times.values())
    warm = first_s > seconds / (2 * TURNS[0])
    if not warm:
        times = {name: [] for name in names}
        first_s = sum(_one_batch(world, array, runs, 3) for runs in names.values())
    each = max(1, min(MOST_IN_BATCH, round(BATCH_S * len(names) / first_s)))
    turns = repeats or int(min(TURNS[1], max(TURNS[0], seconds / (first_s * each))))
    for turn in range(turns - warm):
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(_one_batch(world, array, names[name], each))
    return times


def _one_batch(world: World, array: np.ndarray, algorithm: str, count: int) -> float:
    """Return the seconds that each of `count` all-reduces in a row takes, on the slowest rank (collective)."""
    world.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        allreduce(world.comm, array, algorithm)
    times = np.zeros(world.size)
    times[world.rank] = time.perf_counter() - begin
    allreduce(world.comm, times, "butterfly")
    return float(times.max()) / count


def _row(
    num_ranks: int, num_bytes: int, name: str, runs: str, times: Sequence[float], predicted_s: float | None
) -> AllreduceTime:
    median = statistics.median(times)
    return AllreduceTime(
        num_ranks=num_ranks,
        num_bytes=num_bytes,
        algorithm=name,
        runs=runs,
        repeats=len(times),
        times_s=tuple(times),
        median_s=median,
        fastest_s=min(times),
        bytes_per_s=num_bytes / median,
        predicted_s=predicted_s if predicted_s is None or math.isfinite(predicted_s) else None,
    )
