"""Sums in one binary tree over virtual shards, whatever the number of ranks.

The batch is V shards, and a rank has the shards [a, b) of `geometry.split`. The tree is the one over 0 ... V - 1 in
which a node of level k adds up 2^k neighbours, ((0+1)+(2+3))+..., the last nodes having fewer where V is no power of
two. A rank adds up what lies within its shards, which leaves it one array for each of the largest nodes there, its
*pieces*: one where the ranks are a power of two that divides V, and at most 2 lg V. The rest of the tree is added where
all pieces meet. Floating-point addition commutes but does not associate, so the tree is all that has to be kept.

Everybody sends its pieces straight to whoever completes the sum of that range: one message to each other rank and
piece, in one step. There are at most V ranks, and with one piece a rank this sends no more than recursive halving.

A rank's array holds its own pieces, `count` elements each, then what others send it. In the end the sum stands where
its first piece stood.

References
----------
Balaji, Kimpe, "On the reproducibility of MPI reduction operations", HPCC 2013, on what a fixed order costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from hpcnn import geometry
from hpcnn.errors import PlanError
from hpcnn.geometry import Block
from hpcnn.plan.schedules.collectives import allgather
from hpcnn.plan.schedules.schedule import Addition, Schedule, Step, Transfer, messages


class Node(NamedTuple):
    """The sum of shards number * 2^level up to (number + 1) * 2^level, as far as there are such."""

    level: int
    number: int


def settle(nodes: list[Node], num_shards: int) -> int:
    """Merge the last of a row of nodes, which follow each other, as far as the tree goes; return how many additions.

    Each adds the last node that is left and the one before it. A node whose neighbour would lie beyond the last shard
    stands for its parent too.
    """
    additions = 0
    while True:
        level, number = nodes[-1]
        if number % 2:
            if len(nodes) < 2 or nodes[-2] != Node(level, number - 1):
                return additions
            nodes.pop()
            additions += 1
        elif (number + 1) << level < num_shards or 1 << level >= num_shards:
            return additions
        nodes[-1] = Node(level + 1, number // 2)


@lru_cache(maxsize=1024)
def pieces(num_shards: int, shards: Block) -> tuple[Node, ...]:
    """Return the nodes that a rank with these shards is left with, in ascending order."""
    nodes: list[Node] = []
    for shard in range(*shards):
        nodes.append(Node(0, shard))
        settle(nodes, num_shards)
    return tuple(nodes)


def depth(num_shards: int, shards: Block) -> int:
    """Return how many nodes are held at once, at most, when shards are added one after the other."""
    nodes: list[Node] = []
    most = 0
    for shard in range(*shards):
        nodes.append(Node(0, shard))
        settle(nodes, num_shards)
        most = max(most, len(nodes))
    return most


def sums(rank: int, size: int, num_shards: int, count: int, completed: Sequence[Block]) -> Schedule:
    """Return the schedule after which every rank has the sum, over all shards, of the elements that it completes.

    Parameters
    ----------
    rank, size : int
        This rank and the number of ranks.
    num_shards : int
        V.
    count : int
        Elements of a piece.
    completed : sequence of Block
        Of every rank the elements whose sum it is to have; disjoint for a reduce-scatter, all of them for an
        all-reduce in one step.

    Raises
    ------
    PlanError
        If there are more ranks than shards.
    """
    _check(rank, size, num_shards, completed)
    held = [pieces(num_shards, geometry.split(num_shards, size, other)) for other in range(size)]
    mine = completed[rank]
    sends = [
        Transfer(other, piece * count + theirs.start, piece * count + theirs.stop)
        for other, theirs in enumerate(completed)
        if other != rank
        for piece in range(len(held[rank]))
    ]
    receives: list[Transfer] = []
    end = len(held[rank]) * count
    nodes: list[Node] = []
    places: list[int] = []
    additions: list[Addition] = []
    for other, theirs in enumerate(held):
        for piece, node in enumerate(theirs):
            place = piece * count + mine.start
            if other != rank:
                place, end = end, end + mine.size
                receives.append(Transfer(other, place, end))
            nodes.append(node)
            places.append(place)
            for _ in range(settle(nodes, num_shards)):
                right, left = places.pop(), places.pop()
                into, source = (right, left) if right == mine.start else (left, right)
                places.append(into)
                if mine.size:
                    additions.append(Addition(into, into + mine.size, source))
    step = messages("copy", sends, receives)._replace(additions=tuple(additions))
    steps = (step,) if count and (size > 1 or additions) else ()
    return Schedule(steps, end, local=True)


def allreduce(rank: int, size: int, num_shards: int, count: int) -> Schedule:
    """Return the schedule after which every rank has the whole sum: the sums of a block each, then their all-gather.

    Parameters and errors are those of `sums`.
    """
    scatter = sums(rank, size, num_shards, count, geometry.blocks(count, size))
    gather = allgather("butterfly", rank, size, count)
    steps: tuple[Step, ...] = scatter.steps + gather.steps
    return Schedule(steps, scatter.count, local=True)


def _check(rank: int, size: int, num_shards: int, completed: Sequence[Block]) -> None:
    if not 0 <= rank < size or len(completed) != size:
        raise PlanError(f"tree: rank (={rank}) and {len(completed)} blocks must be those of {size} ranks.")
    if size > num_shards:
        raise PlanError(
            f"plan: {size} ranks share train.virtual_shards (={num_shards}) virtual shards; each needs at least one."
            " Use fewer ranks, or start a run with more shards."
        )
