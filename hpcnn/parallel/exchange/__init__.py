"""How gradients travel: carriers of three kinds, one file each, behind the events of `exchange.Exchange`."""

from __future__ import annotations

from hpcnn import geometry
from hpcnn.comm.world import World
from hpcnn.config import ExchangeConfig
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.exchange.allreduce import AllreduceCarrier
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.parallel.exchange.exchange import Exchange, Update
from hpcnn.parallel.exchange.factors import FactorsCarrier
from hpcnn.parallel.exchange.sharded import ShardedCarrier
from hpcnn.plan.buckets import Bucket
from hpcnn.plan.planner import Plan
from hpcnn.spec import LinearSpec, ModelSpec

__all__ = ["Carrier", "Exchange", "Update", "make_exchange"]


def make_exchange(
    config: ExchangeConfig,
    model: ModelSpec,
    plan: Plan,
    buckets: tuple[Bucket, ...],
    parameters: ParameterSet,
    world: World,
) -> Exchange:
    """Return the exchange with a carrier for every bucket; on one rank nothing travels (collective).

    Raises
    ------
    CommError
        If the settings do not go together.
    """
    engine = world.engine if world.size > 1 else None
    layers = {layer.name: layer for layer in model.layers}
    order = {layer.name: index for index, layer in enumerate(model.layers)}
    samples = geometry.blocks(plan.global_batch, world.size)

    def carrier(bucket: Bucket) -> Carrier:
        priority = order[bucket.layers[-1]]  # the lowest layer is needed first
        replicas = range(world.rank % bucket.cut, world.size, bucket.cut)
        if engine is None or len(replicas) == 1:
            return Carrier(bucket)
        match bucket.kind:
            case "factors":
                spec = layers[bucket.layers[0]]
                assert isinstance(spec, LinearSpec)
                return FactorsCarrier(bucket, spec, samples, engine, parameters, config, priority)
            case "sharded":
                return ShardedCarrier(bucket, replicas, engine, parameters, config, priority)
            case _:
                return AllreduceCarrier(bucket, replicas, engine, parameters, config, priority)

    return Exchange([carrier(bucket) for bucket in buckets], engine, overlap=config.overlap, wait=config.wait)
