"""All-reduce, all-gather and reduce-scatter of NumPy arrays over an mpi4py communicator.

`algorithm` is one of ours ("butterfly", "ring" and, for the all-reduce, "halving-doubling"; see `plan.schedules`),
"mpi" for the library's own, or "auto" for the rule in `plan.choice`. All ranks must pass the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm.collective import check_array
from hpcnn.comm.counters import Traffic
from hpcnn.comm.engine import Engine
from hpcnn.comm.library import load
from hpcnn.comm.persistent import among, within
from hpcnn.errors import CommError
from hpcnn.geometry import split
from hpcnn.plan import choice, schedules
from hpcnn.plan.schedules import Schedule

if TYPE_CHECKING:
    from mpi4py import MPI

MPI_CHUNK_BYTES = 1 << 30
"""The library's all-reduce is called on so many bytes at once: MPI counts in 31 bits."""


def allreduce(
    comm: MPI.Intracomm,
    array: Array,
    algorithm: str = "auto",
    *,
    label: str = "",
    ranks: Sequence[int] | None = None,
) -> None:
    """Replace `array` on every rank by the sum over all ranks, the same bits everywhere (collective).

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    array : Array
        C-contiguous numbers of any shape, equal shapes and types on all ranks; one on a device goes over the host.
    algorithm : str
        "auto", "butterfly", "halving-doubling", "ring" or "mpi". The order of additions depends on it, so the last
        bits of the result do; only "mpi" leaves even equal bits on all ranks to the library.
    label : str
        What is summed, for timelines and for the watchdog.
    ranks : sequence of int, optional
        Who sums together, this rank among them; left out, all. Every rank must be in one such group, and "mpi" has but
        one.

    Raises
    ------
    CommError
        If the array is not contiguous, writable and of a number type, or the library is to sum in groups.
    PlanError
        If the algorithm is unknown.
    """
    engine = engine_of(comm)
    if algorithm == "mpi":
        if ranks is not None:
            raise CommError("comm: algorithm 'mpi' sums over all ranks; a group needs one of hpcnn's algorithms.")
        _mpi_allreduce(engine, array)
        return
    rank, size, nodes = within(engine, ranks)
    if algorithm == "auto":
        check_array(array)
        algorithm = choice.allreduce_algorithm(array.nbytes, size, engine.machine, nodes)
    engine.run(among(_allreduce(algorithm, rank, size, array.size, nodes), ranks), array, label)


def allgather(
    comm: MPI.Intracomm, block: np.ndarray, *, counts: Sequence[int] | None = None, algorithm: str = "auto"
) -> np.ndarray:
    """Return the blocks of all ranks, one after the other along the first axis (collective).

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    block : ndarray, shape (rows, ...)
        This rank's rows. Ranks may bring different numbers of rows, also none.
    counts : sequence of int, optional
        Rows of every rank. Known on all ranks it saves one small exchange; left out the ranks tell each other.
    algorithm : str
        "auto", "butterfly", "ring" or "mpi".

    Returns
    -------
    ndarray, shape (sum(counts), ...)
        Rows of rank 0 first.

    Raises
    ------
    CommError
        If the block has no axis or number type, or `counts` does not fit.
    PlanError
        If the algorithm is unknown.
    """
    engine = engine_of(comm)
    if block.ndim == 0:
        raise CommError("comm: allgather needs at least one axis along which to join; reshape the block to (1,).")
    if counts is None:
        rows = np.zeros(engine.size, np.int64)
        rows[engine.rank] = block.shape[0]
        engine.run(_allgather("butterfly", engine.rank, engine.size, tuple(range(engine.size + 1)), engine.nodes), rows)
        counts = rows.tolist()
    bounds = _boundaries(counts, 1, engine.size)
    start, stop = bounds[engine.rank : engine.rank + 2]
    if stop - start != block.shape[0]:
        raise CommError(f"comm: block (={block.shape[0]} rows) must have counts[rank] (={stop - start}) rows.")
    whole: np.ndarray = arrays.empty((bounds[-1], *block.shape[1:]), block.dtype)
    check_array(whole)
    whole[start:stop] = block
    bounds = _boundaries(counts, _row_size(whole), engine.size)
    if algorithm == "mpi":
        engine.comm.Allgatherv(load().IN_PLACE, _by_block(engine, whole, bounds))
        engine.count(1, block.nbytes)
        return whole
    if algorithm == "auto":
        algorithm = choice.block_algorithm(whole.nbytes, engine.size, engine.machine, engine.nodes)
    engine.run(_allgather(algorithm, engine.rank, engine.size, bounds, engine.nodes), whole)
    return whole


def reduce_scatter(
    comm: MPI.Intracomm, array: np.ndarray, *, counts: Sequence[int] | None = None, algorithm: str = "auto"
) -> np.ndarray:
    """Return this rank's rows of the sum over all ranks (collective). It is the adjoint of `allgather`.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    array : ndarray, shape (rows, ...)
        C-contiguous, equal shapes on all ranks. It is worked in: afterwards only the returned rows mean anything.
    counts : sequence of int, optional
        Rows that every rank gets, rank 0 the first. Default: as even as `geometry.split` makes them.
    algorithm : str
        "auto", "butterfly", "ring" or "mpi".

    Returns
    -------
    ndarray, shape (counts[rank], ...)
        A view into `array`.

    Raises
    ------
    CommError
        If the array is not contiguous, writable and of a number type, or `counts` does not fit.
    PlanError
        If the algorithm is unknown.
    """
    check_array(array)
    engine = engine_of(comm)
    if array.ndim == 0:
        raise CommError("comm: reduce_scatter needs at least one axis along which to split; reshape the array to (1,).")
    if counts is None:
        counts = [split(array.shape[0], engine.size, index).size for index in range(engine.size)]
    rows = _boundaries(counts, 1, engine.size)
    if rows[-1] != array.shape[0]:
        raise CommError(f"comm: counts (sum={rows[-1]}) must add up to the rows of the array (={array.shape[0]}).")
    mine = array[rows[engine.rank] : rows[engine.rank + 1]]
    bounds = _boundaries(counts, _row_size(array), engine.size)
    if algorithm == "mpi":
        result = np.empty_like(mine)
        sizes = [stop - start for start, stop in pairwise(bounds)]
        engine.comm.Reduce_scatter(array, result, sizes)
        engine.count(1, array.nbytes)
        mine[...] = result
        return mine
    if algorithm == "auto":
        algorithm = choice.block_algorithm(
            array.nbytes, engine.size, engine.machine, engine.nodes, kind="reduce_scatter"
        )
    engine.run(_reduce_scatter(algorithm, engine.rank, engine.size, bounds, engine.nodes), array)
    return mine


def traffic(comm: MPI.Intracomm) -> Traffic:
    """Return what this rank has sent through the functions of this module over `comm`."""
    return engine_of(comm).traffic


def engine_of(comm: MPI.Intracomm) -> Engine:
    """Return the engine that serves a communicator, made on first use and freed with it (collective then)."""
    engine = made_engine(comm)
    if engine is None:
        engine = Engine(comm)
        comm.Set_attr(_engine_key(), engine)
    return engine


def made_engine(comm: MPI.Intracomm) -> Engine | None:
    """Return the engine that serves a communicator, None before its first use."""
    engine: Any = comm.Get_attr(_engine_key())
    return cast("Engine | None", engine)


@functools.cache
def _engine_key() -> int:
    """Return the MPI attribute under which a communicator keeps its engine."""
    mpi = load()

    def release(comm: MPI.Comm, _key: int, engine: Engine) -> None:
        if comm != mpi.COMM_WORLD:  # which ends with MPI itself, when nothing may be freed any more
            engine.free()

    return int(mpi.Comm.Create_keyval(delete_fn=release))


# The same few schedules are asked for every step.
@functools.lru_cache(maxsize=256)
def _allreduce(algorithm: str, rank: int, size: int, count: int, nodes: tuple[int, ...]) -> Schedule:
    return schedules.allreduce(algorithm, rank, size, count, nodes=nodes)


@functools.lru_cache(maxsize=256)
def _allgather(algorithm: str, rank: int, size: int, bounds: tuple[int, ...], nodes: tuple[int, ...]) -> Schedule:
    return schedules.allgather(algorithm, rank, size, bounds[-1], bounds, nodes=nodes)


@functools.lru_cache(maxsize=256)
def _reduce_scatter(algorithm: str, rank: int, size: int, bounds: tuple[int, ...], nodes: tuple[int, ...]) -> Schedule:
    return schedules.reduce_scatter(algorithm, rank, size, bounds[-1], bounds, nodes=nodes)


def _boundaries(counts: Sequence[int], row_size: int, size: int) -> tuple[int, ...]:
    if len(counts) != size or min(counts) < 0:
        raise CommError(f"comm: counts (={list(counts)}) must be {size} numbers of rows, one a rank.")
    return tuple(accumulate((count * row_size for count in counts), initial=0))


def _row_size(array: np.ndarray) -> int:
    return int(np.prod(array.shape[1:], dtype=np.int64))


def _by_block(engine: Engine, whole: np.ndarray, bounds: tuple[int, ...]) -> list[Any]:
    sizes = [stop - start for start, stop in pairwise(bounds)]
    return [whole.reshape(-1), sizes, list(bounds[:-1]), load()._typedict[whole.dtype.char]]


def _mpi_allreduce(engine: Engine, array: np.ndarray) -> None:
    check_array(array)
    flat = array.reshape(-1)
    chunk = MPI_CHUNK_BYTES // flat.itemsize
    for start in range(0, flat.size, chunk):
        engine.comm.Allreduce(load().IN_PLACE, flat[start : start + chunk])
        engine.count(1, flat[start : start + chunk].nbytes)
