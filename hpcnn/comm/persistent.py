"""Collectives that are prepared once and started every step, on stretches of flat arrays, in place.

The algorithms are those of `collectives`; "halving-doubling" stands for its halves, recursive halving and doubling,
where only a reduce-scatter or an all-gather is wanted. All functions are collective: all ranks prepare the same
collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from hpcnn.comm.collective import Collective
from hpcnn.comm.counters import Traffic
from hpcnn.comm.engine import Engine
from hpcnn.comm.library import load
from hpcnn.comm.wire import wire_itemsize
from hpcnn.errors import CommError
from hpcnn.plan import choice, schedules


def prepare_allreduce(
    engine: Engine,
    array: np.ndarray,
    algorithm: str = "auto",
    *,
    label: str = "",
    priority: int = 0,
    wire: str = "fp32",
) -> Collective:
    """Return the all-reduce of a flat array.

    Parameters
    ----------
    engine : Engine
        Carries it on.
    array : ndarray, shape (count,)
        Summed in place.
    algorithm : str
        "auto", "butterfly", "halving-doubling", "ring", "hierarchical" or "mpi".
    label, priority, wire
        See `Engine.prepare`.

    Raises
    ------
    CommError
        If the array cannot be summed in place, or the algorithm "mpi" is to send another type than the array's.
    PlanError
        If the algorithm is unknown.
    """
    if algorithm == "mpi":
        _refuse_narrow(wire)
        in_place = load().IN_PLACE
        return engine.prepare_of_library(
            lambda comm: comm.Iallreduce(in_place, array),
            label=label,
            priority=priority,
            traffic=Traffic(1, array.nbytes),
        )
    if algorithm == "auto":
        algorithm = choice.allreduce_algorithm(
            array.nbytes,
            engine.size,
            engine.machine,
            engine.nodes,
            itemsize=array.itemsize,
            wire_bytes=wire_itemsize(wire, array.dtype),
        )
    schedule = schedules.allreduce(algorithm, engine.rank, engine.size, array.size, nodes=engine.nodes)
    return engine.prepare(schedule, array, label=label, priority=priority, wire=wire, round_result=True)


def prepare_reduce_scatter(
    engine: Engine,
    array: np.ndarray,
    boundaries: Sequence[int],
    algorithm: str = "auto",
    *,
    label: str = "",
    priority: int = 0,
    wire: str = "fp32",
) -> Collective:
    """Return the reduce-scatter after which rank r holds the sum of [boundaries[r], boundaries[r + 1]).

    Other parameters and errors are those of `prepare_allreduce`; algorithms: "auto", "butterfly", "ring", "pairwise",
    "hierarchical", "mpi".
    """
    if algorithm == "mpi":
        _refuse_narrow(wire)
        sizes = [stop - start for start, stop in pairwise(boundaries)]
        mine = array[boundaries[engine.rank] : boundaries[engine.rank + 1]]
        result = np.empty_like(mine)
        return engine.prepare_of_library(
            lambda comm: comm.Ireduce_scatter(array, result, sizes),
            lambda: np.copyto(mine, result),
            label=label,
            priority=priority,
            traffic=Traffic(1, array.nbytes),
        )
    algorithm = _block_algorithm(engine, algorithm, "reduce_scatter", array, wire)
    schedule = schedules.reduce_scatter(algorithm, engine.rank, engine.size, array.size, boundaries, nodes=engine.nodes)
    return engine.prepare(schedule, array, label=label, priority=priority, wire=wire)


def prepare_allgather(
    engine: Engine,
    array: np.ndarray,
    boundaries: Sequence[int],
    algorithm: str = "auto",
    *,
    label: str = "",
    priority: int = 0,
    wire: str = "fp32",
) -> Collective:
    """Return the all-gather that starts with [boundaries[r], boundaries[r + 1]) on rank r and completes the array.

    Parameters and errors are those of `prepare_reduce_scatter`.
    """
    if algorithm == "mpi":
        _refuse_narrow(wire)
        mpi = load()
        sizes = [stop - start for start, stop in pairwise(boundaries)]
        whole = [array, sizes, list(boundaries[:-1]), mpi._typedict[array.dtype.char]]
        return engine.prepare_of_library(
            lambda comm: comm.Iallgatherv(mpi.IN_PLACE, whole),
            label=label,
            priority=priority,
            traffic=Traffic(1, sizes[engine.rank] * array.itemsize),
        )
    algorithm = _block_algorithm(engine, algorithm, "allgather", array, wire)
    schedule = schedules.allgather(algorithm, engine.rank, engine.size, array.size, boundaries, nodes=engine.nodes)
    return engine.prepare(schedule, array, label=label, priority=priority, wire=wire)


def prepare_alltoall(
    engine: Engine,
    work: np.ndarray,
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


def _block_algorithm(engine: Engine, algorithm: str, kind: str, array: np.ndarray, wire: str) -> str:
    if algorithm == "halving-doubling":
        return "butterfly"
    if algorithm != "auto":
        return algorithm
    return choice.block_algorithm(
        array.nbytes,
        engine.size,
        engine.machine,
        engine.nodes,
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
