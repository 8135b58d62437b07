"""All-reduce: all ranks get the same bits of the global gradient and make the same update; parameters never travel."""

from __future__ import annotations

from collections.abc import Sequence

from hpcnn.comm.collective import Collective
from hpcnn.comm.engine import Engine
from hpcnn.comm.persistent import prepare_allreduce
from hpcnn.config import ExchangeConfig
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.plan.buckets import Bucket


class AllreduceCarrier(Carrier):
    """Sums a bucket's gradients of all ranks that have these parameters, in place."""

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
        self.counted = self.owned if engine.rank == replicas[0] else ()
        self._sum = prepare_allreduce(
            engine,
            parameters.grads[bucket.start : bucket.stop],
            config.algorithm,
            label=f"gradient sum of {self.label}",
            priority=priority,
            wire=config.wire,
            ranks=replicas,
        )

    @property
    def reducing(self) -> tuple[Collective, ...]:
        """The sum."""
        return (self._sum,)

    def begin(self) -> None:
        """Start the sum."""
        self._sum.start()
