"""Reproducible exchange: gradients of virtual shards are summed in one tree, whatever the number of ranks.

The program hands over the gradients of one shard after the other, which this rank adds up as far as the tree goes. The
rest of the sum travels when the last shard is in. As with other exchanges either all ranks get it ("allreduce"), or
each gets a slice, updates that and tells the others the parameters ("sharded").
"""

from __future__ import annotations

from collections.abc import Sequence

from hpcnn import arrays, geometry
from hpcnn.arrays import Array
from hpcnn.comm.collective import Collective
from hpcnn.comm.engine import Engine
from hpcnn.comm.persistent import prepare_allgather
from hpcnn.config import ExchangeConfig
from hpcnn.geometry import Block
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.parallel.tree import Pile
from hpcnn.plan import schedules
from hpcnn.plan.buckets import Bucket
from hpcnn.plan.schedules import tree


class TreeCarrier(Carrier):
    """Sums a bucket's gradients over all shards.

    Parameters
    ----------
    num_shards : int
        Virtual shards of the batch.
    engine : Engine or None
        None on one rank, where nothing travels.
    spare : Array, shape (places, count)
        Where sums of a single layer are kept meanwhile; for all carriers, which use it one after the other.
    """

    def __init__(
        self,
        bucket: Bucket,
        num_shards: int,
        engine: Engine | None,
        parameters: ParameterSet,
        config: ExchangeConfig,
        priority: int,
        spare: Array,
    ) -> None:
        super().__init__(bucket)
        rank, size = (0, 1) if engine is None else (engine.rank, engine.size)
        self._rank, self._engine = rank, engine
        self._is_sharded = bucket.kind == "sharded" and size > 1
        self._slices = geometry.blocks(bucket.size, size)
        self._bounds = [block.start for block in self._slices] + [bucket.size]
        if self._is_sharded:
            start, stop = self._slices[rank]
            self.owned = self.counted = (Block(bucket.start + start, bucket.start + stop),)
            self.owns_whole_tensors = False
            schedule = tree.sums(rank, size, num_shards, bucket.size, self._slices)
        else:
            self.counted = self.owned if rank == 0 else ()
            schedule = tree.allreduce(rank, size, num_shards, bucket.size)
        self._grads = parameters.grads[bucket.start : bucket.stop]
        self._work = arrays.empty(schedule.count, self._grads.dtype)
        shards = geometry.split(num_shards, size, rank)
        pieces = len(tree.pieces(num_shards, shards))
        own = self._work[: pieces * bucket.size].reshape(pieces, bucket.size)
        self._piles: dict[str, tuple[Pile, Array]] = {}
        for layer, (start, stop) in _stretches(bucket, parameters).items():
            places = [*own[:, start:stop], *spare[:, : stop - start]]
            self._piles[layer] = (Pile(num_shards, shards, places), self._grads[start:stop])
        self._sum: Collective | None = None
        self._gather: Collective | None = None
        if engine is not None:
            self._sum = engine.prepare(schedule, self._work, label=f"gradient sum of {self.label}", priority=priority)
        if engine is not None and self._is_sharded:
            values = parameters.values[bucket.start : bucket.stop]
            label = f"parameters of {self.label}"
            self._gather = prepare_allgather(
                engine, values, self._bounds, config.algorithm, label=label, priority=priority
            )

    def shard_ready(self, layer: str) -> None:
        """Add the gradients of a layer's next shard."""
        pile, grads = self._piles[layer]
        pile.add(grads)

    @property
    def reducing(self) -> tuple[Collective, ...]:
        """The rest of the sum."""
        return () if self._sum is None else (self._sum,)

    @property
    def publishing(self) -> tuple[Collective, ...]:
        """The all-gather of parameters."""
        return () if self._gather is None else (self._gather,)

    def begin(self) -> None:
        """Start the rest of the sum."""
        if self._sum is not None:
            self._sum.start()

    def take(self) -> None:
        """Return with the global gradients of `owned` in the flat vector."""
        super().take()
        start, stop = self._slices[self._rank] if self._is_sharded else (0, self.bucket.size)
        self._grads[start:stop] = self._work[start:stop]

    def publish(self) -> None:
        """Start the all-gather of parameters."""
        if self._gather is not None:
            self._gather.start()

    def collect(self, flat: Array) -> None:
        """Send the slices to rank 0."""
        if self._engine is not None and self._is_sharded:
            schedule = schedules.gather(self._rank, self._engine.size, 0, self._bounds)
            stretch = flat[self.bucket.start : self.bucket.stop]
            self._engine.run(schedule, stretch, f"state of {self.label}")


def make_tree_carriers(
    buckets: Sequence[Bucket],
    num_shards: int,
    engine: Engine | None,
    parameters: ParameterSet,
    config: ExchangeConfig,
    priorities: Sequence[int],
) -> list[TreeCarrier]:
    """Return a carrier for every bucket (collective)."""
    rank, size = (0, 1) if engine is None else (engine.rank, engine.size)
    shards = geometry.split(num_shards, size, rank)
    places = tree.depth(num_shards, shards) - len(tree.pieces(num_shards, shards))
    longest = max(block.size for bucket in buckets for block in _stretches(bucket, parameters).values())
    spare = arrays.empty((places, longest), parameters.grads.dtype)
    return [
        TreeCarrier(bucket, num_shards, engine, parameters, config, priority, spare)
        for bucket, priority in zip(buckets, priorities, strict=True)
    ]


def _stretches(bucket: Bucket, parameters: ParameterSet) -> dict[str, Block]:
    """Return where in the bucket each of its layers lies."""
    found: dict[str, Block] = {}
    for name, (start, stop) in parameters.offsets.items():
        layer = name.rpartition("/")[0]
        if layer in bucket.layers:
            first = found[layer].start if layer in found else start - bucket.start
            found[layer] = Block(first, stop - bucket.start)
    return found
