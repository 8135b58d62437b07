"""Collectives that are prepared once and started every step, on stretches of flat arrays, in place.

The algorithms are those of `collectives`; "halving-doubling" stands for its halves, recursive halving and doubling,
where only a reduce-scatter or an all-gather is wanted. All functions are collective: all ranks prepare the same
collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from hpcnn.arrays import Array
from hpcnn.comm import nccl
from hpcnn.comm.collective import Collective
from hpcnn.comm.counters import Traffic
from hpcnn.comm.engine import Engine
from hpcnn.comm.library import load
from hpcnn.comm.staging import WHOLE, Touched
from hpcnn.comm.wire import wire_itemsize
from hpcnn.errors import CommError
from hpcnn.plan import choice, schedules
from hpcnn.plan.schedules import Schedule
from hpcnn.plan.schedules.schedule import mapped


def prepare_allreduce(
    engine: Engine,
    array: Array,
    algorithm: str = "auto",
    *,
    label: str = "",
    priority: int = 0,
    wire: str = "fp32",
    ranks: Sequence[int] | None = None,
) -> Collective:
    """Return the all-reduce of a flat array.

    Parameters
    ----------
    engine : Engine
        Carries it on.
    array : Array, shape (count,)
        Summed in place; on the host or on a device.
    algorithm : str
        "auto", "butterfly", "halving-doubling", "ring", "hierarchical", "mpi" or "nccl".
    label, priority, wire
        See `Engine.prepare`.
    ranks : sequence of int, optional
        Who takes part, this rank among them; left out, all. Every rank must be in one such group.

    Raises
    ------
    CommError
        If the array cannot be summed in place, the algorithm "mpi" is to send another type than the array's, or "nccl"
        finds no GPU for each rank.
    PlanError
        If the algorithm is unknown.
    """
    if algorithm == "nccl":
        return nccl.prepare(engine, array, label=label, priority=priority, ranks=ranks)
    if algorithm == "mpi":
        _refuse_narrow(wire)
        in_place = load().IN_PLACE
        return engine.prepare_of_library(
            array,
            lambda comm, host: comm.Iallreduce(in_place, host),
            parts=WHOLE,
            label=label,
            priority=priority,
            traffic=Traffic(1, array.nbytes),
            ranks=ranks,
        )
    rank, size, nodes = within(engine, ranks)
    if algorithm == "auto":
        algorithm = choice.allreduce_algorithm(
            array.nbytes,
            size,
            engine.machine,
            nodes,
            itemsize=array.itemsize,
            wire_bytes=wire_itemsize(wire, array.dtype),
        )
    schedule = among(schedules.allreduce(algorithm, rank, size, array.size, nodes=nodes), ranks)
    return engine.prepare(schedule, array, label=label, priority=priority, wire=wire, round_result=True)


def prepare_reduce_scatter(
    engine: Engine,
    array: Array,
    boundaries: Sequence[int],
    algorithm: str = "auto",
    *,
    label: str = "",
    priority: int = 0,
    wire: str = "fp32",
    ranks: Sequence[int] | None = None,
) -> Collective:
    """Return the reduce-scatter after which rank r holds the sum of [boundaries[r], boundaries[r + 1]).

    Other parameters and errors are those of `prepare_allreduce`; algorithms: "auto", "butterfly", "ring", "pairwise",
    "hierarchical", "mpi".
    """
    rank, size, nodes = within(engine, ranks)
    if algorithm == "mpi":
        _refuse_narrow(wire)
        sizes = [stop - start for start, stop in pairwise(boundaries)]
        mine = slice(boundaries[rank], boundaries[rank + 1])
        result = np.empty(sizes[rank], array.dtype)
        return engine.prepare_of_library(
            array,
            lambda comm, host: comm.Ireduce_scatter(host, result, sizes),
            lambda host: np.copyto(host[mine], result),
            parts=Touched(WHOLE.reads, (mine,)),
            label=label,
            priority=priority,
            traffic=Traffic(1, array.nbytes),
            ranks=ranks,
        )
    algorithm = _block_algorithm(engine, algorithm, "reduce_scatter", array, wire, size, nodes)
    schedule = among(schedules.reduce_scatter(algorithm, rank, size, array.size, boundaries, nodes=nodes), ranks)
    return engine.prepare(schedule, array, label=label, priority=priority, wire=wire)


def prepare_allgather(
    engine: Engine,
    array: Array,
    boundaries: Sequence[int],
    algorithm: str = "auto",
    *,
    label: str = "",
    priority: int = 0,
    wire: str = "fp32",
    ranks: Sequence[int] | None = None,
) -> Collective:
    """Return the all-gather that starts with [boundaries[r], boundaries[r + 1]) on rank r and completes the array.

    Parameters and errors are those of `prepare_reduce_scatter`.
    """
    rank, size, nodes = within(engine, ranks)
    if algorithm == "mpi":
        _refuse_narrow(wire)
        mpi = load()
        sizes = [stop - start for start, stop in pairwise(boundaries)]
        places, kind = list(boundaries[:-1]), mpi._typedict[array.dtype.char]
        return engine.prepare_of_library(
            array,
            lambda comm, host: comm.Iallgatherv(mpi.IN_PLACE, [host, sizes, places, kind]),
            parts=Touched((slice(boundaries[rank], boundaries[rank + 1]),), WHOLE.writes),
            label=label,
            priority=priority,
            traffic=Traffic(1, sizes[rank] * array.itemsize),
            ranks=ranks,
        )
    algorithm = _block_algorithm(engine, algorithm, "allgather", array, wire, size, nodes)
    schedule = among(schedules.allgather(algorithm, rank, size, array.size, boundaries, nodes=nodes), ranks)
    return engine.prepare(schedule, array, label=label, priority=priority, wire=wire)


def prepare_alltoall(
    engine: Engine,
    work: Array,
    counts: Sequence[Sequence[int]],
    *,
    label: str = "",
    priority: int = 0,
    wire: str = "fp32",
) -> Collective:
    """Return the all-to-all, by direct exchange, of a work array laid out as `schedules.alltoall` says.

    `counts[i][j]` elements go from rank i to rank j. The caller copies what stays on this rank.
    """
    schedule = schedules.alltoall("pairwise", engine.rank, engine.size, counts)
    return engine.prepare(schedule, work, label=label, priority=priority, wire=wire)


def among(schedule: Schedule, ranks: Sequence[int] | None) -> Schedule:
    """Return a schedule written for ranks 0, 1, ... as one of `ranks`."""
    return schedule if ranks is None else replace(schedule, steps=mapped(schedule.steps, ranks))


def within(engine: Engine, ranks: Sequence[int] | None) -> tuple[int, int, tuple[int, ...]]:
    """Return this rank's number among `ranks`, how many they are, and their nodes."""
    if ranks is None:
        return engine.rank, engine.size, engine.nodes
    return list(ranks).index(engine.rank), len(ranks), tuple(engine.nodes[rank] for rank in ranks)


def _block_algorithm(
    engine: Engine, algorithm: str, kind: str, array: Array, wire: str, size: int, nodes: tuple[int, ...]
) -> str:
    if algorithm == "halving-doubling":
        return "butterfly"
    if algorithm != "auto":
        return algorithm
    return choice.block_algorithm(
        array.nbytes,
        size,
        engine.machine,
        nodes,
        kind=kind,
        itemsize=array.itemsize,
        wire_bytes=wire_itemsize(wire, array.dtype),
    )


def _refuse_narrow(wire: str) -> None:
    if wire != "fp32":
        raise CommError(
            f"comm: wire type (={wire!r}) is not for algorithm 'mpi', whose library sums what it sends."
            ' Use exchange.wire = "fp32" or one of hpcnn\'s algorithms.'
        )
