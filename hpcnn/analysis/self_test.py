"""A look of about two seconds at the messages between ranks: whether sums are right and fast, and no pair is slow.

Not a measurement to plan by (that is `profile_machine.py`), but enough to find a cable, a host or a fallback to TCP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hpcnn.analysis.profile_links import Meter
from hpcnn.comm.collectives import allreduce
from hpcnn.comm.world import World
from hpcnn.plan.choice import allreduce_algorithms
from hpcnn.plan.machine import DEFAULT, Machine
from hpcnn.plan.pricing import allreduce_seconds
from hpcnn.plan.schedules import Schedule, Step, Transfer

COUNTS = (1, 1001, 65_537, 1_048_576)
"""Elements of the float32 arrays that are summed: odd ones too, so that blocks differ in length."""

TURNS = 3
"""Of each sum and each exchange the fastest turn counts."""

MODULUS, EXACT = 1009, 1 << 24
"""Elements are whole numbers below the first, and their sums below the second: any order of additions is exact."""

MOST_WEIGHT = 16
PAIR_COUNT = 65_536
MOST_ROUNDS = 16
"""Partners that a rank exchanges messages with."""

SUM_SHARE = 0.6
"""Of the time, for sums; the rest is for pairs."""


@dataclass(frozen=True, kw_only=True)
class Sum:
    """An all-reduce: whether it was right on all ranks, and the seconds of the slowest rank in the fastest turn."""

    algorithm: str
    num_bytes: int
    wrong_ranks: tuple[int, ...]
    seconds: float
    predicted_s: float | None
    """Price of the schedule; None for "mpi"."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Seconds of an exchange of messages between two ranks while others exchange theirs, in the fastest turn."""

    ranks: tuple[int, int]
    seconds: float
    same_node: bool


@dataclass(kw_only=True)
class Outcome:
    """What the self-test found; lists are complete on rank 0 only."""

    sums: list[Sum] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    pair_bytes: int = PAIR_COUNT * 4
    measured: bool = False
    """Whether the prices are those of a measured machine."""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def self_test(world: World, *, seconds: float = 2.0, machine: Machine | None = None) -> Outcome:
    """Sum arrays by every algorithm and exchange messages pair by pair, for about so many seconds (collective).

    Every algorithm sums every length once, whatever it takes, until the time for sums is up; the longest lengths come
    last.

    Parameters
    ----------
    world : World
        The ranks.
    seconds : float
        About how long it may last.
    machine : Machine, optional
        What times are compared to; default: the built-in machine.
    """
    begin = time.perf_counter()
    world.barrier()  # a rank that does not come is named here; making the engine would wait inside MPI
    meter, nodes = Meter(world), world.engine.nodes
    outcome = Outcome(measured=machine is not None)
    if world.size > 1:
        names = (*allreduce_algorithms(nodes), "mpi")
        rows = _sums(meter, names, begin + SUM_SHARE * seconds)
        everyone = world.gather_obj([right for *_, right in rows]) or []
        for index, (name, count, fastest, _) in enumerate(rows):
            wrong = tuple(rank for rank, right in enumerate(everyone) if not right[index])
            price = None if name == "mpi" else allreduce_seconds(name, count, machine or DEFAULT, nodes)
            outcome.sums.append(
                Sum(algorithm=name, num_bytes=4 * count, wrong_ranks=wrong, seconds=fastest, predicted_s=price)
            )
        mine = _exchanges(meter, begin + seconds)
        outcome.pairs = _pairs(world.gather_obj(mine) or [], nodes)
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _sums(meter: Meter, names: Sequence[str], end: float) -> list[tuple[str, int, float, bool]]:
    """Return (algorithm, elements, seconds, whether it was right here) of the sums that fitted in (collective)."""
    world, rows = meter.world, []
    for count in COUNTS:
        for name in names:
            fastest, right = float("inf"), True
            for _ in range(TURNS):
                array, expected = _numbers(count, world.rank, world.size)
                world.barrier()
                begin = time.perf_counter()
                allreduce(world.comm, array, name)
                fastest = min(fastest, meter.slowest(time.perf_counter() - begin))
                right = right and bool(np.array_equal(array, expected))
                if meter.slowest(time.perf_counter() - end) > 0.0:
                    break
            rows.append((name, count, fastest, right))
        if meter.slowest(time.perf_counter() - end) > 0.0:
            break
    return rows


def _numbers(count: int, rank: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what a rank brings to a sum, and the sum over all ranks, which float32 holds exactly."""
    weights = sum(1 + other % MOST_WEIGHT for other in range(size))
    base = (np.arange(count) % min(MODULUS, max(2, EXACT // weights))).astype(np.float32) + 1.0
    base = np.minimum(base, EXACT // weights).astype(np.float32)
    return base * np.float32(1 + rank % MOST_WEIGHT), base * np.float32(weights)


def _exchanges(meter: Meter, end: float) -> list[tuple[int, int, float]]:
    """Return (lower rank, higher rank, seconds) of this rank's exchanges with some others (collective).

    In round r the ranks i and r - i meet, all pairs at once, so that `size` rounds let everybody meet everybody.
    """
    world, found = meter.world, []
    rank, size = world.rank, world.size
    rounds = sorted({index * size // min(size, MOST_ROUNDS) for index in range(min(size, MOST_ROUNDS))})
    array = np.zeros(2 * PAIR_COUNT, np.float32)
    for number in rounds:
        partner = (number - rank) % size
        fastest = float("inf")
        for _ in range(TURNS):
            world.barrier()
            begin = time.perf_counter()
            world.engine.run(_exchange(partner, idle=partner == rank), array)
            fastest = min(fastest, time.perf_counter() - begin)
        if partner != rank:
            found.append((min(rank, partner), max(rank, partner), fastest))
        if meter.slowest(time.perf_counter() - end) > 0.0:
            break
    return found


def _exchange(partner: int, *, idle: bool) -> Schedule:
    out = () if idle else (Transfer(partner, 0, PAIR_COUNT),)
    back = () if idle else (Transfer(partner, PAIR_COUNT, 2 * PAIR_COUNT),)
    return Schedule((Step(out, back),), 2 * PAIR_COUNT, local=True)


def _pairs(everyone: Sequence[Sequence[tuple[int, int, float]]], nodes: Sequence[int]) -> list[Pair]:
    """Return the pairs that any rank has timed, as long as the slower of the two took."""
    slowest: dict[tuple[int, int], float] = {}
    for low, high, seconds in (row for rows in everyone for row in rows):
        slowest[low, high] = max(seconds, slowest.get((low, high), 0.0))
    return [
        Pair(ranks=pair, seconds=seconds, same_node=nodes[pair[0]] == nodes[pair[1]])
        for pair, seconds in sorted(slowest.items())
    ]
