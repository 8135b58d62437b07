"""All-reduce, all-gather and reduce-scatter by the name of their algorithm."""

from __future__ import annotations

from collections.abc import Sequence

from hpcnn.plan.schedules import blocks, butterflies, checks, hierarchy
from hpcnn.plan.schedules.schedule import Schedule, Step, adjoint

ALLREDUCE_ALGORITHMS = ("butterfly", "halving-doubling", "ring", "hierarchical")
BLOCK_ALGORITHMS = ("butterfly", "ring", "pairwise", "hierarchical")


def allreduce(algorithm: str, rank: int, size: int, count: int, *, nodes: Sequence[int] | None = None) -> Schedule:
    """Return the schedule after which every rank holds the sum of all ranks' `count` elements.

    Parameters
    ----------
    algorithm : str
        One of ALLREDUCE_ALGORITHMS.
    rank, size, count : int
        This rank, the number of ranks, and the number of elements.
    nodes : sequence of int, optional
        The node of every rank, numbered anyhow, in any order over the ranks; equal on all of them. Only
        "hierarchical" looks at it. Default: all on one node, where "hierarchical" is flat: halving-doubling for a
        power of two, otherwise a reduce-scatter and an all-gather by "butterfly", which fold nothing.

    Raises
    ------
    PlanError
        If the algorithm is unknown, a number is out of range, or `nodes` has another length than `size`.
    """
    checks.check_numbers(rank, size, count)
    checks.check_algorithm("allreduce", algorithm, ALLREDUCE_ALGORITHMS)
    places = checks.check_nodes(size, nodes)
    if size == 1 or count == 0:
        return Schedule((), count)
    steps: Sequence[Step]
    if algorithm == "hierarchical":
        steps = hierarchy.allreduce(rank, places, count)
    elif algorithm == "ring":
        gather = tuple(blocks.ring(rank, size, checks.check_boundaries(size, count, None)))
        steps = adjoint(gather) + gather
    elif algorithm == "butterfly":
        steps = tuple(butterflies.butterfly(rank, size, count))
    else:
        steps = tuple(butterflies.halving_doubling(rank, size, count))
    return Schedule(tuple(steps), count)


def allgather(
    algorithm: str,
    rank: int,
    size: int,
    count: int,
    boundaries: Sequence[int] | None = None,
    *,
    nodes: Sequence[int] | None = None,
) -> Schedule:
    """Return the schedule after which every rank holds all blocks, having started with its own.

    A rank receives every element but its own once. "butterfly" is recursive doubling on a power of two, lg p messages;
    on other sizes it is Bruck's algorithm in ceil(lg p) steps, where a range that wraps past the last rank is two
    messages. "ring" passes the blocks on from neighbour to neighbour, "pairwise" has every owner send to every rank
    itself: p - 1 messages each. "hierarchical" lets every block cross to every other node once.

    Parameters
    ----------
    algorithm : str
        One of BLOCK_ALGORITHMS.
    rank, size, count : int
        This rank, the number of ranks, and the number of elements in all blocks together.
    boundaries : sequence of int, optional
        size + 1 ascending numbers from 0 to count: rank i owns [boundaries[i], boundaries[i + 1]).
        Default: the blocks of `geometry.split`.
    nodes : sequence of int, optional
        The node of every rank, as for `allreduce`. Default: all on one node, where "hierarchical" is "butterfly".

    Raises
    ------
    PlanError
        If the algorithm is unknown, a number is out of range, or boundaries or nodes are not as above.
    """
    checks.check_numbers(rank, size, count)
    checks.check_algorithm("allgather", algorithm, BLOCK_ALGORITHMS)
    places = checks.check_nodes(size, nodes)
    bounds = checks.check_boundaries(size, count, boundaries)
    if size == 1 or count == 0:
        return Schedule((), count)
    if algorithm == "hierarchical" and len(set(places)) > 1:
        return Schedule(hierarchy.allgather(rank, places, tuple(bounds)), count)
    if algorithm == "ring":
        return Schedule(tuple(blocks.ring(rank, size, bounds)), count)
    if algorithm == "pairwise":
        return Schedule(tuple(blocks.pairwise(rank, size, bounds)), count)
    return Schedule(tuple(blocks.butterfly(rank, size, blocks.runs(size, bounds))), count)


def reduce_scatter(
    algorithm: str,
    rank: int,
    size: int,
    count: int,
    boundaries: Sequence[int] | None = None,
    *,
    nodes: Sequence[int] | None = None,
) -> Schedule:
    """Return the schedule after which rank i holds the sum over all ranks of block i, the rest being scratch.

    It is the adjoint of `allgather`: the same messages backwards, summed. On a power of two "butterfly" is thereby
    recursive halving, distances p/2, ..., 2, 1: one tree for all elements, but not the one of the all-reduce.
    "pairwise" adds to the own block those of rank - 1, rank - 2, ..., in this order. Parameters and errors are those of
    `allgather`.
    """
    gathering = allgather(algorithm, rank, size, count, boundaries, nodes=nodes)
    return Schedule(adjoint(gathering.steps), count)
