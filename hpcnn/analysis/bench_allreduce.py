"""How fast each all-reduce algorithm is on these ranks, message size by message size, next to the library's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hpcnn.comm.collectives import allreduce
from hpcnn.comm.world import World
from hpcnn.plan.choice import allreduce_algorithm
from hpcnn.plan.schedules import ALLREDUCE_ALGORITHMS

SIZES = tuple(4 << shift for shift in range(0, 25, 2))
"""Message sizes in bytes: 4 B to 64 MB, each four times the one before."""

ALGORITHMS = (*ALLREDUCE_ALGORITHMS, "mpi")
FLOAT_BYTES = 4
SECONDS_PER_SIZE = 1.0
WARM_UPS = 2


@dataclass(frozen=True, kw_only=True)
class AllreduceTime:
    """One algorithm at one message size."""

    num_ranks: int
    num_bytes: int
    algorithm: str
    repeats: int
    median_s: float
    """Median over the repeats of the slowest rank's time."""
    fastest_s: float
    bytes_per_s: float
    """Algorithmic bandwidth: size of the array by median time."""
    chosen: bool
    """Whether "auto" takes this algorithm here."""

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values, for a JSON line."""
        return asdict(self)


def bench_allreduce(
    world: World,
    sizes: Sequence[int] = SIZES,
    algorithms: Sequence[str] = ALGORITHMS,
    repeats: int | None = None,
) -> list[AllreduceTime]:
    """Return the times of every algorithm at every size, equal on all ranks (collective).

    The algorithms take turns, forwards and backwards, so that a disturbance meets all of them alike. The ranks start
    each run together; a run lasts as long as its slowest rank.

    Parameters
    ----------
    world : World
        The ranks.
    sizes : sequence of int
        Message sizes in bytes, multiples of 4: the arrays are float32.
    algorithms : sequence of str
        Names that `comm.allreduce` takes.
    repeats : int, optional
        Runs of each algorithm at each size. Default: about a second's worth, between 5 and 100.
    """
    rows = []
    for num_bytes in sizes:
        array = np.zeros(num_bytes // FLOAT_BYTES, np.float32)
        times: dict[str, list[float]] = {name: [] for name in algorithms}
        longest = max(_one_run(world, array, name) for _ in range(WARM_UPS) for name in algorithms)
        turns = repeats or int(min(100, max(5, SECONDS_PER_SIZE / (longest * len(algorithms)))))
        for turn in range(turns):
            for name in algorithms if turn % 2 == 0 else reversed(algorithms):
                times[name].append(_one_run(world, array, name))
        chosen = allreduce_algorithm(num_bytes, world.size)
        rows += [_row(world.size, num_bytes, name, times[name], name == chosen) for name in algorithms]
    return rows


def format_table(rows: Sequence[AllreduceTime]) -> str:
    """Return the rows as text: a line a size, median microseconds and bandwidth an algorithm, "*" what auto takes."""
    if not rows:
        return "no measurements"
    algorithms = list(dict.fromkeys(row.algorithm for row in rows))
    sizes = list(dict.fromkeys(row.num_bytes for row in rows))
    cells = {(row.num_bytes, row.algorithm): row for row in rows}
    lines = [
        f"all-reduce of float32 over {rows[0].num_ranks} ranks: median time and bytes/time; * is what auto takes",
        f"{'size':>8}  " + "".join(f"{name:>26}" for name in algorithms),
    ]
    for size in sizes:
        line = f"{_size_text(size):>8}  "
        for name in algorithms:
            row = cells[size, name]
            mark = "*" if row.chosen else " "
            line += f"{row.median_s * 1e6:>12.1f} us {row.bytes_per_s / 1e9:>5.2f} GB/s{mark}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _one_run(world: World, array: np.ndarray, algorithm: str) -> float:
    """Return the seconds of the slowest rank in one run (collective)."""
    world.barrier()
    begin = time.perf_counter()
    allreduce(world.comm, array, algorithm)
    times = np.zeros(world.size)
    times[world.rank] = time.perf_counter() - begin
    allreduce(world.comm, times, "butterfly")
    return float(times.max())


def _row(num_ranks: int, num_bytes: int, algorithm: str, times: Sequence[float], chosen: bool) -> AllreduceTime:
    median = statistics.median(times)
    return AllreduceTime(
        num_ranks=num_ranks,
        num_bytes=num_bytes,
        algorithm=algorithm,
        repeats=len(times),
        median_s=median,
        fastest_s=min(times),
        bytes_per_s=num_bytes / median,
        chosen=chosen,
    )


def _size_text(num_bytes: int) -> str:
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << shift:
            return f"{num_bytes / (1 << shift):g} {unit}"
    return f"{num_bytes} B"
