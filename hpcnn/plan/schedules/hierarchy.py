"""Collectives that know which ranks share a node, and let as little as possible travel between nodes.

Ranks are numbered within their node in ascending order. Rank l of every node is in *lane* l, as far as all nodes go:
there are as many lanes as the smallest node has ranks. Between nodes messages stay in their lane, so that all ranks of
a node send at once. The ranks of larger nodes that are in no lane work within their node only. A node's ranks may
stand anywhere among the others, node by node or dealt out in turn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import TypeAlias

from hpcnn import geometry
from hpcnn.geometry import Block
from hpcnn.plan.schedules import blocks, butterflies, checks
from hpcnn.plan.schedules.schedule import Step, Transfer, adjoint, mapped, messages, padded, watched

Ranges: TypeAlias = tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class NodeMap:
    """Who is where."""

    members: tuple[tuple[int, ...], ...]
    """Ranks of every node in ascending order, the nodes in the order of their first ranks."""
    place: tuple[tuple[int, int], ...]
    """Of every rank its node, as an index of `members`, and its number within the node."""
    num_lanes: int

    def lane(self, number: int) -> list[int]:
        """Return the ranks of a lane, one from each node."""
        return [ranks[number] for ranks in self.members]

    @property
    def is_even(self) -> bool:
        """Whether all nodes have equally many ranks, so that every rank is in a lane."""
        return all(len(ranks) == self.num_lanes for ranks in self.members)

    @property
    def num_inner_steps(self) -> int:
        """Steps that gathering in the largest node takes."""
        return blocks.num_butterfly_steps(max(len(ranks) for ranks in self.members))


@lru_cache(maxsize=32)
def node_map(nodes: tuple[int, ...]) -> NodeMap:
    """Return who is where, from the node of every rank."""
    groups: dict[int, list[int]] = {}
    place = []
    for rank, node in enumerate(nodes):
        ranks = groups.setdefault(node, [])
        place.append((node, len(ranks)))
        ranks.append(rank)
    index = {node: position for position, node in enumerate(groups)}
    return NodeMap(
        tuple(tuple(ranks) for ranks in groups.values()),
        tuple((index[node], number) for node, number in place),
        min(len(ranks) for ranks in groups.values()),
    )


def allreduce(rank: int, nodes: tuple[int, ...], count: int) -> tuple[Step, ...]:
    """Reduce-scatter inside the node, all-reduce across the nodes in each lane, all-gather inside the node.

    Across, it is halving-doubling for a power of two of nodes, otherwise the ring. Where nodes differ in size a step
    before and one after it make up the lanes' shares of the sum from the blocks of all ranks of the node and return
    them, so a rank in no lane costs its node no more than its block.
    """
    world = node_map(nodes)
    node, number = world.place[rank]
    ranks = world.members[node]
    gathering = padded(mapped(_inner_steps(number, len(ranks), count), ranks), world.num_inner_steps)
    collect, spread = _between(number, ranks, world.num_lanes, count)
    across = _across(node, len(world.members), _inner_block(number % world.num_lanes, world.num_lanes, count).size)
    if number < world.num_lanes:
        start = _inner_block(number, world.num_lanes, count).start
        across = mapped(across, world.lane(number), start)
    else:
        across = watched(across)
    if not world.is_even:
        across = (collect, *across, spread)
    return adjoint(gathering) + across + gathering


def _inner_block(number: int, size: int, count: int) -> Block:
    """Return the block that a rank of a node of `size` ranks has after the reduce-scatter in the node."""
    if size & (size - 1):
        return geometry.split(count, size, number)
    return butterflies.half(number, size, count)


def _inner_steps(number: int, size: int, count: int) -> tuple[Step, ...]:
    """Return the steps that gather the inner blocks."""
    if size & (size - 1):
        bounds = checks.check_boundaries(size, count, None)
        return tuple(blocks.butterfly(number, size, blocks.runs(size, bounds)))
    return butterflies.halves(butterflies.fold(number, size), count)


def _between(number: int, ranks: Sequence[int], num_lanes: int, count: int) -> tuple[Step, Step]:
    """Return the step that brings a node's inner blocks to its lanes, and the one that brings them back."""
    inner = [_inner_block(index, len(ranks), count) for index in range(len(ranks))]
    shares = [_inner_block(lane, num_lanes, count) for lane in range(num_lanes)]
    to_lanes = [
        Transfer(ranks[lane], *_common(inner[number], share)) for lane, share in enumerate(shares) if lane != number
    ]
    share = shares[number] if number < num_lanes else Block(0, 0)
    from_members = [
        Transfer(ranks[index], *_common(block, share)) for index, block in enumerate(inner) if index != number
    ]
    return messages("copy", to_lanes, from_members), messages("copy", from_members, to_lanes)


def _common(first: Block, second: Block) -> Block:
    start = max(first.start, second.start)
    return Block(start, max(start, min(first.stop, second.stop)))


def _across(node: int, num_nodes: int, count: int) -> tuple[Step, ...]:
    """Return the all-reduce of one lane, its ranks numbered as their nodes."""
    if num_nodes & (num_nodes - 1) == 0:
        return tuple(butterflies.halving_doubling(node, num_nodes, count))
    gathering = tuple(blocks.ring(node, num_nodes, checks.check_boundaries(num_nodes, count, None)))
    return adjoint(gathering) + gathering


def allgather(rank: int, nodes: tuple[int, ...], bounds: tuple[int, ...]) -> tuple[Step, ...]:
    """Gather the node's blocks inside the node, swap them in lanes across the nodes, spread what came inside the node.

    Between nodes each lane carries its share of a node's elements, in even parts however uneven the blocks; every
    element crosses once to every other node. Nodes of different sizes need no further steps: what a rank in no lane
    owns its lanes have after the first part, and in the last it has nothing to give but what it has just received.
    """
    world = node_map(nodes)
    node, number = world.place[rank]
    ranks = world.members[node]
    depth = world.num_inner_steps
    own = [(Block(bounds[member], bounds[member + 1]),) for member in ranks]
    inside = mapped(_gather(number, own), ranks)
    shares = _shares(world, bounds)
    across = tuple(_gather(node, [shares[index][number % world.num_lanes] for index in range(len(shares))]))
    across = mapped(across, world.lane(number)) if number < world.num_lanes else watched(across)
    foreign = [
        _joined([of_node[member] for index, of_node in enumerate(shares) if index != node])
        if member < world.num_lanes
        else ()
        for member in range(len(ranks))
    ]
    spread = mapped(_gather(number, foreign), ranks)
    return padded(inside, depth) + across + padded(spread, depth)


def _gather(number: int, pieces: Sequence[Ranges]) -> tuple[Step, ...]:
    """Return the steps after which all have all pieces, the one with `number` having started with its own."""

    def where(first: int, length: int) -> Ranges:
        return _joined([pieces[(first + index) % len(pieces)] for index in range(length)])

    return tuple(blocks.butterfly(number, len(pieces), where))


def _joined(pieces: Sequence[Ranges]) -> Ranges:
    """Return disjoint ranges in ascending order, those that touch being one."""
    joined: list[Block] = []
    for block in sorted(chain.from_iterable(pieces)):
        if joined and joined[-1].stop == block.start:
            joined[-1] = Block(joined[-1].start, block.stop)
        elif block.size:
            joined.append(block)
    return tuple(joined)


@lru_cache(maxsize=32)
def _shares(world: NodeMap, bounds: tuple[int, ...]) -> tuple[tuple[Ranges, ...], ...]:
    """Return for every node and lane which of the node's elements the lane carries."""
    return tuple(
        _parts([Block(bounds[rank], bounds[rank + 1]) for rank in ranks], world.num_lanes) for ranks in world.members
    )


def _parts(owned: Sequence[Block], num_parts: int) -> tuple[Ranges, ...]:
    """Return the elements of a node's blocks in parts as even as they are worth.

    A cut moves to the end of a block when that is within an eighth of a part: a sliver would cost one more message.
    """
    ends = list(accumulate((block.size for block in owned), initial=0))
    total = ends[-1]
    cuts = []
    for part in range(num_parts):
        even = geometry.split(total, num_parts, part).start
        after = bisect_right(ends, even)
        near = min(ends[max(0, after - 1) : after + 1], key=lambda end: abs(end - even))
        cuts.append(near if 8 * num_parts * abs(near - even) <= total else even)
    parts: list[Ranges] = [()] * num_parts
    for start, stop in pairwise(sorted({*ends, *cuts})):
        index = bisect_right(ends, start) - 1
        shift = owned[index].start - ends[index]
        parts[bisect_right(cuts, start) - 1] += (Block(start + shift, stop + shift),)
    return tuple(_joined([part]) for part in parts)
