"""Measures the machine that these ranks run on: the numbers of `plan.machine.Machine`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hpcnn import ops
from hpcnn.analysis.profile_links import Meter, classes_of, measure_crossing, measure_link, significant
from hpcnn.comm.collectives import allreduce
from hpcnn.comm.library import load
from hpcnn.comm.world import World
from hpcnn.errors import CommError
from hpcnn.plan.machine import Link, Machine, Measured, Rates

MAX_BYTES = 64 << 20
"""Longest message."""


def profile(
    world: World, *, max_bytes: int = MAX_BYTES, seconds: float = 60.0, nodes: Sequence[int] | None = None
) -> Machine:
    """Return the machine as measured by all ranks together, equal on all of them (collective).

    Parameters
    ----------
    world : World
        The ranks, as they would be started for training.
    max_bytes : int
        Longest message.
    seconds : float
        About how long the messages may take. Where links are slow, long messages are left out.
    nodes : sequence of int, optional
        The node of every rank. Default: as the MPI library sees it.

    Raises
    ------
    CommError
        If there is only one rank.
    """
    if world.size == 1:
        raise CommError("profile: a single rank exchanges no messages; at least 2 are needed. Use mpiexec -n 2.")
    nodes = world.engine.nodes if nodes is None else nodes
    gamma, rates = _gamma(world), _rates(world)
    links: dict[str, Link | None] = {"node": None, "network": None}
    classes = classes_of(nodes)
    meter = Meter(world)
    start_s = 0.0
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
        rates=rates,
        measured=Measured(
            hosts=len(set(nodes)),
            ranks=world.size,
            cores=len(os.sched_getaffinity(0)),
            mpi=f"{vendor} {'.'.join(map(str, version))}",
        ),
    )


def _gamma(world: World) -> float:
    """Return the seconds to add a byte's worth of float32, on the slowest of all ranks adding at once (collective)."""
    here, there = np.zeros(1 << 20, np.float32), np.ones(1 << 20, np.float32)
    return _slowest(world, lambda: np.add(here, there, out=here), 9) / here.nbytes


def _rates(world: World) -> Rates:
    """Return how fast a rank computes typical layers while all do (collective)."""
    generator = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    x, y, filters = normal(4, 28, 28, 128), normal(4, 28, 28, 128), normal(128, 3, 3, 128)
    conv_flops = 2 * y.size * filters[0].size
    rows, errors, weight = normal(32, 2048), normal(32, 2048), np.asfortranarray(normal(2048, 2048))
    linear_flops = 2 * len(rows) * weight.size
    value, grad, velocity = np.zeros((3, 1 << 21), np.float32)

    def linear() -> None:
        ops.linear_forward(rows, weight)
        ops.linear_backward_input(errors, weight)
        ops.linear_backward_weight(rows, errors)

    def rate(work: float, call: Callable[[], object]) -> float:
        return significant(work / _slowest(world, call, 5))

    return Rates(
        conv_forward_flops_per_s=rate(conv_flops, lambda: ops.conv2d_forward(x, filters, padding=1)),
        conv_input_gradient_flops_per_s=rate(
            conv_flops, lambda: ops.conv2d_backward_input(y, filters, (28, 28), padding=1)
        ),
        conv_weight_gradient_flops_per_s=rate(conv_flops, lambda: ops.conv2d_backward_weight(x, y, (3, 3), padding=1)),
        linear_flops_per_s=rate(3 * linear_flops, linear),
        update_bytes_per_s=rate(5 * value.nbytes, lambda: ops.sgd_update(value, grad, velocity, lr=0.1, momentum=0.9)),
    )


def _slowest(world: World, call: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of a call on the rank where that is longest (collective)."""
    call()
    times = []
    for _ in range(repeats):
        world.barrier()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    medians = np.zeros(world.size)
    medians[world.rank] = statistics.median(times)
    allreduce(world.comm, medians, "butterfly")
    return float(medians.max())
