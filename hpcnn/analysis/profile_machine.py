"""Measures the machine that these ranks run on: the numbers of `plan.machine.Machine`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hpcnn import ops
from hpcnn.analysis.profile_links import Meter, classes_of, measure_crossing, measure_link, significant
from hpcnn.analysis.profile_program import layer_seconds
from hpcnn.analysis.stopwatch import Stopwatch
from hpcnn.comm.collective import Collective
from hpcnn.comm.collectives import allreduce
from hpcnn.comm.library import load
from hpcnn.comm.persistent import prepare_allreduce
from hpcnn.comm.world import World
from hpcnn.plan.machine import Link, Machine, Measured, Rates

MAX_BYTES = 64 << 20
"""Longest message."""

STALL_S, MEETINGS = 0.03, 40
"""Computation between two meetings, as long as that of a layer, and how often ranks meet."""

LONG_BYTES, SHORT_BYTES, BESIDE_S = 1 << 22, 1 << 10, 1.0
"""What travels, again and again, beside a computation of about so many seconds: a usual bucket of gradients, halved
where fewer than `JOURNEYS` would arrive meanwhile, and what shows the cost of looking for messages."""
JOURNEYS = 4

SLOWEST_PACE = 0.05
"""Of messages beside computation that is believed."""


def profile(
    world: World,
    *,
    max_bytes: int = MAX_BYTES,
    seconds: float = 60.0,
    watch: Stopwatch | None = None,
    nodes: Sequence[int] | None = None,
) -> Machine:
    """Return the machine as measured by all ranks together, equal on all of them (collective).

    Parameters
    ----------
    world : World
        The ranks, as they would be started for training; of a single one only the computation is measured.
    max_bytes : int
        Longest message.
    seconds : float
        About how long the messages may take. Where links are slow, long messages are left out.
    watch : Stopwatch, optional
        Of these ranks; left out, one is made.
    nodes : sequence of int, optional
        The node of every rank. Default: as the MPI library sees it.
    """
    nodes = world.engine.nodes if nodes is None else nodes
    watch = watch or Stopwatch(world)
    gamma, rates = _gamma(watch), _rates(world, watch)
    links: dict[str, Link | None] = {"node": None, "network": None}
    classes = classes_of(nodes) if world.size > 1 else {}
    meter = Meter(world)
    start_s = Machine().start_s
    for name, groups in classes.items():  # last the network's, which those of all ranks use
        sharing = len(groups) if name == "network" else 1
        link, start_s = measure_link(meter, groups, sharing, max_bytes, seconds / len(classes))
        links[name] = replace(link, crossing=measure_crossing(meter, link, groups)) if sharing > 1 else link
    vendor, version = load().get_vendor()
    return Machine(
        start_s=significant(start_s),
        gamma_s_per_byte=significant(gamma),
        node=links["node"],
        network=links["network"],
        stall_s=significant(_stall(world, watch)),
        rates=rates,
        measured=Measured(
            hosts=len(set(nodes)),
            ranks=world.size,
            cores=len(os.sched_getaffinity(0)),
            mpi=f"{vendor} {'.'.join(map(str, version))}",
        ),
    )


def _gamma(watch: Stopwatch) -> float:
    """Return the seconds to add a byte's worth of float32, on the slowest of all ranks adding at once (collective)."""
    here, there = np.zeros(1 << 20, np.float32), np.ones(1 << 20, np.float32)
    return watch.seconds([lambda: np.add(here, there, out=here)])[0] / here.nbytes


def _rates(world: World, watch: Stopwatch) -> Rates:
    """Return how fast a rank computes typical layers while all do (collective)."""
    generator = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    x, y, filters = normal(4, 28, 28, 128), normal(4, 28, 28, 128), normal(128, 3, 3, 128)
    conv_flops = 2 * y.size * filters[0].size
    rows, errors, weight = normal(32, 2048), normal(32, 2048), np.asfortranarray(normal(2048, 2048))
    linear_flops = 2 * len(rows) * weight.size
    value, grad, velocity = np.zeros((3, 1 << 21), np.float32)
    few, large = normal(8), normal(1 << 22)

    def linear() -> None:
        ops.linear_forward(rows, weight)
        ops.linear_backward_input(errors, weight)
        ops.linear_backward_weight(rows, errors)

    works: list[tuple[float, Callable[[], object]]] = [
        (conv_flops, lambda: ops.conv2d_forward(x, filters, padding=1)),
        (conv_flops, lambda: ops.conv2d_backward_input(y, filters, (28, 28), padding=1)),
        (conv_flops, lambda: ops.conv2d_backward_weight(x, y, (3, 3), padding=1)),
        (3 * linear_flops, linear),
        (5 * value.nbytes, lambda: ops.sgd_update(value, grad, velocity, lr=0.1, momentum=0.9)),
        (2 * large.nbytes, lambda: ops.activation_forward(large, "relu")),
    ]
    times = watch.seconds([call for _, call in works], at_least_s=0.5)
    forward, input_gradient, weight_gradient, fully, update, memory = (
        significant(work / seconds) for (work, _), seconds in zip(works, times, strict=True)
    )
    long, short = (
        _beside(world, watch, lambda: ops.conv2d_forward(x[:1], filters, padding=1), num_bytes)
        for num_bytes in (LONG_BYTES, SHORT_BYTES)
    )
    share = min(1.0, short.cost_s / short.journey_s)
    per_byte = max(0.0, long.cost_s - share * long.journey_s) / max(1, long.num_bytes)
    return Rates(
        conv_forward_flops_per_s=forward,
        conv_input_gradient_flops_per_s=input_gradient,
        conv_weight_gradient_flops_per_s=weight_gradient,
        linear_flops_per_s=fully,
        update_bytes_per_s=update,
        memory_bytes_per_s=memory,
        call_s=significant(watch.seconds([lambda: ops.activation_forward(few, "relu")])[0]),
        layer_s=significant(layer_seconds(watch)),
        beside_s_per_byte=significant(per_byte),
        beside_share=significant(share),
        pace_beside=significant(long.pace),
    )


def _stall(world: World, watch: Stopwatch) -> float:
    """Return how long ranks wait for one another, besides the message, when they meet after computing (collective)."""
    x, filters, number = np.ones((1, 28, 28, 64), np.float32), np.ones((64, 3, 3, 64), np.float32), np.zeros(2)

    def compute() -> None:
        ops.conv2d_forward(x, filters, padding=1)

    def meet() -> None:
        allreduce(world.comm, number, "butterfly")

    if world.size == 1:
        return 0.0

    def each(times: int) -> float:
        """Return the seconds of a meeting and of computing so many times before."""
        world.barrier()
        begin = time.perf_counter()
        for _ in range(MEETINGS):
            for _ in range(times):
                compute()
            meet()
        return watch.slowest([time.perf_counter() - begin])[0] / MEETINGS

    compute_s = watch.seconds([compute])[0]
    times = max(1, round(STALL_S / compute_s))
    return max(0.0, each(times) - times * compute_s - each(0))


class _Beside(NamedTuple):
    """What computation and an all-reduce do to each other."""

    cost_s: float
    """By which the computation lasts longer."""
    journey_s: float
    """How long the all-reduce is under way."""
    num_bytes: int
    """What the busiest rank sends."""
    pace: float


def _journey(world: World, watch: Stopwatch, num_bytes: int) -> tuple[Collective, float]:
    """Return an all-reduce of so many bytes, or of fewer where that takes long, and its seconds alone (collective)."""
    travel = prepare_allreduce(world.engine, np.zeros(num_bytes // 4, np.float32), label="bytes beside computation")
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        travel.start()
        travel.wait()
        times.append(time.perf_counter() - begin)
    seconds = watch.slowest([statistics.median(times[1:])])[0]
    if num_bytes > SHORT_BYTES and seconds * JOURNEYS > BESIDE_S:
        return _journey(world, watch, num_bytes // 2)
    return travel, seconds


def _beside(world: World, watch: Stopwatch, compute: Callable[[], object], num_bytes: int) -> _Beside:
    """Return by how much an all-reduce of so many bytes lengthens a computation, and how fast it is then (collective).

    There are fewer bytes where they take too long.

    Parameters
    ----------
    compute : callable
        Short, as messages are only looked at between two calls.
    """
    if world.size == 1:
        return _Beside(0.0, 1.0, 0, 1.0)
    world.engine.carry_on_in_background()
    travel, travel_s = _journey(world, watch, num_bytes)
    compute_s = watch.seconds([compute])[0]
    count, starts = max(8, int(BESIDE_S / compute_s)), max(1, int(BESIDE_S / travel_s))

    def run(num_starts: int) -> tuple[float, list[float]]:
        """Return the seconds of the computation, and those of each journey that arrived meanwhile."""
        world.barrier()
        begin = time.perf_counter()
        started, left = begin, num_starts
        journeys: list[float] = []
        for _ in range(count):
            now = time.perf_counter()
            if left < num_starts and travel.done and len(journeys) < num_starts - left:
                journeys.append(now - started - compute_s / 2)  # arrived at some moment of the last call
            if left and travel.done:
                travel.start()
                started, left = now, left - 1
            compute()
        seconds = time.perf_counter() - begin
        travel.wait()
        for _ in range(left):  # all ranks start it as often
            travel.start()
            travel.wait()
        return seconds, journeys

    alone = statistics.median(run(0)[0] for _ in range(3))
    together = [run(starts) for _ in range(3)]
    costs = [(seconds - alone) / max(1, len(journeys)) for seconds, journeys in together]
    journeys = [each for _, some in together for each in some] or [alone]
    mine = [statistics.median(costs), statistics.median(journeys), travel.traffic.num_bytes]
    cost, journey_s, sent = watch.slowest(mine)
    return _Beside(max(0.0, cost), journey_s, int(sent), min(1.0, max(SLOWEST_PACE, travel_s / journey_s)))
