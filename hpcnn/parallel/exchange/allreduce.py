"""Sum the gradients of all ranks, bucket by bucket, in the order in which backward completes them.

Every rank then holds the same bits of the global gradient and makes the same update: parameters never travel.
"""

from __future__ import annotations

from hpcnn.comm.collectives import allreduce
from hpcnn.comm.world import World
from hpcnn.config import ExchangeConfig
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.exchange.base import SerialExchange
from hpcnn.plan.buckets import make_buckets
from hpcnn.spec import ModelSpec


class AllreduceExchange(SerialExchange):
    """Bucketed all-reduce.

    A bucket is reduced as soon as the last of its layers has its gradient. All ranks run the same program, so they
    reach the buckets in the same order without negotiating.
    """

    def __init__(self, config: ExchangeConfig, model: ModelSpec, parameters: ParameterSet, world: World) -> None:
        super().__init__(parameters)
        self._comm = world.comm
        self._algorithm = config.algorithm
        self._grads = parameters.grads
        self.buckets = make_buckets(model.layers, config.bucket_bytes)
        self._bucket_of = {name: bucket for bucket in self.buckets for name in bucket.layers}
        self._missing = {bucket: len(bucket.layers) for bucket in self.buckets}

    def gradient_ready(self, layer: str) -> None:
        """Reduce the bucket of `layer` if this was the last gradient it waited for (collective then)."""
        bucket = self._bucket_of.get(layer)
        if bucket is None:
            return
        self._missing[bucket] -= 1
        if self._missing[bucket] == 0:
            self._missing[bucket] = len(bucket.layers)
            allreduce(self._comm, self._grads[bucket.start : bucket.stop], self._algorithm)
