"""Arrays of virtual shards, added up in the tree of `plan/schedules/tree.py` as a rank comes to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm.world import World
from hpcnn.geometry import Block, split
from hpcnn.plan.schedules import tree
from hpcnn.plan.schedules.tree import Node


class Pile:
    """Adds the arrays of a rank's shards, one after the other, as far as the tree goes.

    Parameters
    ----------
    num_shards : int
        Virtual shards of the batch.
    shards : Block
        Those of this rank.
    places : sequence of Array
        Where sums are kept: as many as `tree.depth` says. In the end the first ones hold the rank's pieces.
    """

    def __init__(self, num_shards: int, shards: Block, places: Sequence[Array]) -> None:
        self._num_shards = num_shards
        self._shards = shards
        self._places = places
        self._next = shards.start
        self._nodes: list[Node] = []

    def add(self, array: Array) -> None:
        """Take the array of the next shard; after the last one it begins anew."""
        places, held = self._places, len(self._nodes)
        self._nodes.append(Node(0, self._next))
        additions = tree.settle(self._nodes, self._num_shards)
        if additions == 0:
            places[held][...] = array
        else:
            np.add(places[held - 1], array, out=places[held - 1])
        for right in range(held - 1, held - additions, -1):
            np.add(places[right - 1], places[right], out=places[right - 1])
        self._next += 1
        if self._next == self._shards.stop:
            self._next = self._shards.start
            self._nodes.clear()


class SmallSum:
    """The sum over all shards of a few float64 numbers each, with equal bits on all ranks.

    Parameters
    ----------
    count : int
        How many numbers.
    num_shards : int
        Virtual shards of the batch.
    world : World
        The ranks.
    """

    def __init__(self, count: int, num_shards: int, world: World) -> None:
        shards = split(num_shards, world.size, world.rank)
        everything = (Block(0, count),) * world.size
        self._schedule = tree.sums(world.rank, world.size, num_shards, count, everything)
        self._work = arrays.empty(self._schedule.count, np.float64)
        spare = arrays.empty((tree.depth(num_shards, shards), count), np.float64)
        pieces = len(tree.pieces(num_shards, shards))
        own = self._work[: pieces * count].reshape(pieces, count)
        self._result = own[0]
        self._world = world
        self.pile = Pile(num_shards, shards, [*own, *spare[pieces:]])

    def result(self, label: str) -> np.ndarray:
        """Return the sum, once `pile` has been given the numbers of all shards here (collective)."""
        if self._schedule.steps:
            self._world.engine.run(self._schedule, self._work, label)
        return self._result
