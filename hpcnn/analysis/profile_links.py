"""Measures what messages cost, through the engine, in the regime that they meet in a collective.

Schedules of several steps are timed in which every rank sends to one rank and receives from one at the same time, the
partners changing from step to step. The whole goes round in rounds, each length once a round, so that a slow moment of
the machine falls on all lengths alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hpcnn.comm.collectives import allreduce
from hpcnn.comm.world import World
from hpcnn.plan.machine import Link
from hpcnn.plan.schedules import Schedule, Step, Transfer

FLOAT_BYTES = 4
STEPS = 12
"""Exchanges of a measured schedule; fewer where they are long."""

SHORT_STEPS = 2
"""Exchanges of another schedule, whose time tells what starting costs."""

CROSSING_BYTES = 256 << 10
"""What is on a node's link when it is measured how messages get into each other's way."""

LONG_S = 0.05
"""A schedule of short exchanges lasts about so long at most; long exchanges are measured two at a time."""

BATCH_S = 0.02
"""Short schedules are run again and again for so long between two looks at the clock."""

LEAST_BYTES = 1 << 18
"""Lengths up to here are measured whatever it takes: a line through shorter ones tells nothing of longer ones."""

LEAST_S_PER_BYTE = 1e-15
"""Slopes below are noise: they stand for a petabyte a second."""

ROUNDS = (3, 15)
"""Rounds that are made in any case, and at most."""


def classes_of(nodes: Sequence[int]) -> dict[str, list[list[int]]]:
    """Return, for each kind of link that these ranks have, the groups of ranks which exchange with each other.

    In nodes a group is a node. Between nodes the first ranks of all nodes are a group, the second ones another, and so
    on as far as every node goes: all share the nodes' links, as in a collective.
    """
    members: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    classes = {}
    inside = [group for group in members.values() if len(group) > 1]
    if inside:
        classes["node"] = inside
    if len(members) > 1:
        classes["network"] = [list(lane) for lane in zip(*members.values(), strict=False)]
    return classes


def exchanges(rank: int, groups: Sequence[Sequence[int]], count: int, steps: int, *, summing: bool) -> Schedule:
    """Return `steps` exchanges of `count` elements with the members of the own group in turn, on 2 count elements.

    Distances change from step to step, the same on all ranks: 1, 2, ..., so that pairs and rings both occur. A rank in
    no group watches.
    """
    idle = Step(combine="sum" if summing else "copy")
    group = next((group for group in groups if rank in group), None)
    if group is None or count == 0:
        return Schedule((idle,) * steps, 2 * count, local=True)
    here, made = group.index(rank), []
    for step in range(steps):
        distance = 1 + step % (len(group) - 1)
        to, source = group[(here + distance) % len(group)], group[(here - distance) % len(group)]
        send, receive = Transfer(to, 0, count), Transfer(source, count, 2 * count)
        made.append(Step((send,), (receive,), idle.combine))
    return Schedule(tuple(made), 2 * count, local=True)


def crossings(rank: int, lanes: Sequence[Sequence[int]], count: int, steps: int) -> list[Schedule]:
    """Return schedules in which the ranks of a node get into each other's way on its link, `count` elements each way.

    In the first, the last rank of every node sends to the first rank of the next node, as in a ring. In the second all
    ranks send and receive, each lane at another distance; that takes three nodes.
    """
    num_nodes = len(lanes[0])
    after = dict(zip(lanes[-1], [*lanes[0][1:], lanes[0][0]], strict=True))
    before = {to: source for source, to in after.items()}
    send = (Transfer(after[rank], 0, count),) if rank in after else ()
    receive = (Transfer(before[rank], count, 2 * count),) if rank in before else ()
    found = [Schedule((Step(send, receive),) * steps, 2 * count, local=True)]
    if num_nodes > 2:
        share = count // len(lanes)
        number = next((number for number, lane in enumerate(lanes) if rank in lane), 0)
        turned = exchanges(rank, lanes, share, steps + number, summing=False)
        found.append(Schedule(turned.steps[number:], 2 * share, local=True))
    return found


def fit_line(sizes: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Return alpha and beta of the line alpha + beta n that is nearest to the times, in proportion to each."""
    n, t = np.asarray(sizes, float), np.asarray(times, float)
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([1.0 / t, n / t], axis=1), np.ones(len(t)), rcond=None)
    if beta < LEAST_S_PER_BYTE:
        alpha, beta = 1.0 / np.mean(1.0 / t), 0.0
    if alpha <= 0.0:
        alpha = float(t.min())
    return float(alpha), float(beta)


def ascending(times: Sequence[float]) -> list[float]:
    """Return the nearest numbers that do not fall, in proportion: a longer message that took less was disturbed less.

    Neighbours in the wrong order are both replaced by their geometric mean, together with those already joined.
    """
    runs: list[tuple[float, int]] = []
    for seconds in times:
        total, count = math.log(seconds), 1
        while runs and runs[-1][0] / runs[-1][1] > total / count:
            before = runs.pop()
            total, count = total + before[0], count + before[1]
        runs.append((total, count))
    return [math.exp(total / count) for total, count in runs for _ in range(count)]


class Meter:
    """Times schedules on all ranks, as long as the slowest takes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._array = np.zeros(0, np.float32)

    def reserve(self, num_elements: int) -> None:
        """Make room; pages are touched here and not when they are timed."""
        if self._array.size < num_elements:
            self._array = np.zeros(num_elements, np.float32)
            self._array.fill(0.0)

    def seconds(self, schedule: Schedule, runs: int) -> float:
        """Return the seconds of a run, of `runs` in a row, on the slowest rank (collective)."""
        array, engine = self._array[: schedule.count], self.world.engine
        self.world.barrier()
        begin = time.perf_counter()
        for _ in range(runs):
            engine.run(schedule, array)
        return self.slowest(time.perf_counter() - begin) / runs

    def slowest(self, seconds: float) -> float:
        """Return the largest of the ranks' numbers (collective)."""
        times = np.zeros(self.world.size)
        times[self.world.rank] = seconds
        allreduce(self.world.comm, times, "butterfly")
        return float(times.max())


@dataclass
class _Case:
    """One schedule to be timed again and again."""

    schedule: Schedule
    runs: int = 1
    times: list[float] = field(default_factory=list)

    def measure(self, meter: Meter) -> float:
        """Time it once more and return the seconds that took, all runs together (collective)."""
        seconds = meter.seconds(self.schedule, self.runs)
        self.times.append(seconds)
        return seconds * self.runs

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def measure_link(
    meter: Meter, groups: Sequence[Sequence[int]], sharing: int, max_bytes: int, budget_s: float
) -> tuple[Link, float]:
    """Return the link between the ranks of each group, and what starting a collective costs (collective).

    So many ranks are `sharing` a link: its lengths are what they send in all.
    """
    rank = meter.world.rank
    began = time.perf_counter()
    meter.reserve(2)
    short = [_prepare(meter, exchanges(rank, groups, 1, SHORT_STEPS, summing=summing)) for summing in (False, True)]
    cases: dict[tuple[int, bool], _Case] = {}
    size, steps, round_s = FLOAT_BYTES, STEPS, 0.0
    while size == FLOAT_BYTES or size * sharing <= max_bytes:
        meter.reserve(2 * size // FLOAT_BYTES)
        for summing in (False, True):
            case = _prepare(meter, exchanges(rank, groups, size // FLOAT_BYTES, steps, summing=summing))
            cases[size, summing] = case
            round_s += case.median * case.runs
        longest = max(cases[size, summing].median / steps for summing in (False, True))
        size *= 2
        steps = max(2, min(STEPS, int(LONG_S / (2.0 * longest))))
        # The next length takes about twice as long, to try it and in each of the rounds.
        if size > LEAST_BYTES and (ROUNDS[0] + 1) * (round_s + 4.0 * longest * steps) > budget_s:
            break
    for number in range(ROUNDS[1]):
        left_s = budget_s - meter.slowest(time.perf_counter() - began)
        if number >= ROUNDS[0] and left_s < round_s:
            break
        for case in (*short, *cases.values()):
            case.measure(meter)
    start_s = _start(cases, short)
    return _link(cases, sharing, start_s), start_s


def _prepare(meter: Meter, schedule: Schedule) -> _Case:
    """Return a case that has been tried, and knows how often to run for a batch; the trial is not kept if short."""
    case = _Case(schedule)
    first_s = case.measure(meter)
    if first_s < BATCH_S:
        case.times.clear()
        again_s = meter.seconds(schedule, 3)
        case.runs = max(1, min(1000, round(BATCH_S / again_s)))
        case.measure(meter)
    return case


def _start(cases: dict[tuple[int, bool], _Case], short: Sequence[_Case]) -> float:
    """Return the seconds of a collective besides its steps: what remains of a short one without its share of a long.

    The two of each round are compared with each other, as they met the same moment of the machine.
    """
    found = []
    for summing, some in zip((False, True), short, strict=True):
        many = cases[FLOAT_BYTES, summing]
        steps, few = len(many.schedule.steps), len(some.schedule.steps)
        for long_s, short_s in zip(reversed(many.times), reversed(some.times), strict=False):
            found.append((steps * short_s - few * long_s) / (steps - few))
    return max(1e-9, statistics.median(found))


def _link(cases: dict[tuple[int, bool], _Case], sharing: int, start_s: float) -> Link:
    """Return the link from the times of its schedules."""
    sizes = sorted({size for size, _ in cases})
    columns = []
    for summing in (False, True):
        some = [cases[size, summing] for size in sizes]
        times = [max(1e-9, (case.median - start_s) / len(case.schedule.steps)) for case in some]
        columns.append(tuple(significant(seconds) for seconds in ascending(times)))
    sizes = [size * sharing for size in sizes]
    alpha, beta = fit_line(sizes, columns[0])
    return Link(
        alpha_s=significant(alpha),
        beta_s_per_byte=significant(beta),
        sizes=tuple(sizes),
        copy_s=columns[0],
        sum_s=columns[1],
    )


def measure_crossing(meter: Meter, link: Link, lanes: Sequence[Sequence[int]]) -> float:
    """Return how many times as long long messages take where they get into each other's way (collective)."""
    size = max(length for length in link.sizes if length <= max(CROSSING_BYTES, link.sizes[0]))
    meter.reserve(2 * size // FLOAT_BYTES)
    ratios = []
    for schedule in crossings(meter.world.rank, lanes, size // FLOAT_BYTES, STEPS):
        case = _prepare(meter, schedule)
        for _ in range(ROUNDS[0]):
            case.measure(meter)
        ratios.append(case.median / STEPS / link.seconds(size))
    return significant(max(1.0, statistics.fmean(ratios)))


def significant(value: float) -> float:
    """Return the value with four digits: more say nothing and make the file hard to read."""
    return float(f"{value:.4g}")
