"""Sharded update: each rank sums, updates and keeps optimizer state for its slice of every bucket.

A reduce-scatter travels behind backward, the all-gather of the updated parameters behind the next forward. Together
they send what an all-reduce sends, in two halves that hide behind twice the computation, and the update takes a P-th
of the time and of the optimizer's memory.

References
----------
Lee, Agrawal, Balaprakash, Choudhary, Liao, "Communication-efficient parallelization strategy for deep convolutional
neural network training", MLHPC 2018.
Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", SC 2020 (stage 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from hpcnn import geometry
from hpcnn.arrays import Array
from hpcnn.comm.collective import Collective
from hpcnn.comm.engine import Engine
from hpcnn.comm.persistent import among, prepare_allgather, prepare_reduce_scatter
from hpcnn.config import ExchangeConfig
from hpcnn.geometry import Block
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.plan import schedules
from hpcnn.plan.buckets import Bucket


class ShardedCarrier(Carrier):
    """Reduce-scatter of a bucket's gradients, all-gather of its parameters; each replica owns a slice."""

    owns_whole_tensors = False

    def __init__(
        self,
        bucket: Bucket,
        replicas: Sequence[int],
        engine: Engine,
        parameters: ParameterSet,
        config: ExchangeConfig,
        priority: int,
    ) -> None:
        super().__init__(bucket)
        self._engine = engine
        self._replicas = replicas
        self._number = replicas.index(engine.rank)
        self._bounds = [block.start for block in geometry.blocks(bucket.size, len(replicas))] + [bucket.size]
        first, last = self._bounds[self._number : self._number + 2]
        self.owned = self.counted = (Block(bucket.start + first, bucket.start + last),)
        self._sum = prepare_reduce_scatter(
            engine,
            parameters.grads[bucket.start : bucket.stop],
            self._bounds,
            config.algorithm,
            label=f"gradient slices of {self.label}",
            priority=priority,
            wire=config.wire,
            ranks=replicas,
        )
        self._gather = prepare_allgather(
            engine,
            parameters.values[bucket.start : bucket.stop],
            self._bounds,
            config.algorithm,
            label=f"parameters of {self.label}",
            priority=priority,
            ranks=replicas,
        )

    @property
    def reducing(self) -> tuple[Collective, ...]:
        """The reduce-scatter."""
        return (self._sum,)

    @property
    def publishing(self) -> tuple[Collective, ...]:
        """The all-gather."""
        return (self._gather,)

    def begin(self) -> None:
        """Start the reduce-scatter."""
        self._sum.start()

    def publish(self) -> None:
        """Start the all-gather."""
        self._gather.start()

    def collect(self, flat: Array) -> None:
        """Send the slices to the first replica."""
        schedule = among(schedules.gather(self._number, len(self._replicas), 0, self._bounds), self._replicas)
        self._engine.run(schedule, flat[self.bucket.start : self.bucket.stop], f"state of {self.label}")
