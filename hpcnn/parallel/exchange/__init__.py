"""How gradients travel: carriers of several kinds, one file each, behind the events of `exchange.Exchange`."""

from __future__ import annotations

from collections.abc import Sequence

from hpcnn import geometry
from hpcnn.comm.world import World
from hpcnn.config import ExchangeConfig
from hpcnn.errors import PlanError
from hpcnn.geometry import Block
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.exchange.allreduce import AllreduceCarrier
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.parallel.exchange.exchange import Exchange, Update
from hpcnn.parallel.exchange.factors import FactorsCarrier
from hpcnn.parallel.exchange.lazy import LazyCarrier, Rounds
from hpcnn.parallel.exchange.sharded import ShardedCarrier
from hpcnn.parallel.exchange.tree import make_tree_carriers
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
    *,
    num_shards: int = 0,
) -> Exchange:
    """Return the exchange with a carrier for every bucket; on one rank nothing travels (collective).

    Parameters
    ----------
    num_shards : int
        Virtual shards of the batch, over which gradients are summed in one tree; 0: none, they are summed over ranks.

    Raises
    ------
    CommError
        If the settings do not go together.
    PlanError
        If a lazy layer's weights are cut.
    """
    engine = world.engine if world.size > 1 else None
    layers = {layer.name: layer for layer in model.layers}
    order = {layer.name: index for index, layer in enumerate(model.layers)}
    samples = geometry.blocks(plan.global_batch, world.size)

    priorities = [order[bucket.layers[-1]] for bucket in buckets]  # the lowest layer is needed first
    if num_shards:
        trees = make_tree_carriers(buckets, num_shards, engine, parameters, config, priorities)
        return Exchange(trees, engine, overlap=config.overlap, wait=config.wait)

    def carrier(bucket: Bucket, priority: int) -> Carrier:
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

    carriers = [carrier(bucket, priority) for bucket, priority in zip(buckets, priorities, strict=True)]
    rounds = None
    lazy = [bucket for bucket in buckets if bucket.every > 1]
    if lazy:
        _refuse_cut(lazy)
        top = lazy[0].layers[0]  # backward comes to it first
        watched = _stretch(parameters, top) if config.lazy_adaptive else Block(0, 0)
        rounds = Rounds(lazy[0].every, watched, parameters, engine)
        carriers = [
            LazyCarrier(one, rounds, parameters, watched=top) if one.bucket.every > 1 else one for one in carriers
        ]
    return Exchange(carriers, engine, overlap=config.overlap, wait=config.wait, rounds=rounds)


def _refuse_cut(buckets: Sequence[Bucket]) -> None:
    for bucket in buckets:
        if bucket.cut > 1:
            raise PlanError(
                f"exchange: the weights of {bucket.label} are cut, and lazy updates are for layers that all ranks have"
                " whole. Lower exchange.lazy_layers or choose another plan.preset."
            )


def _stretch(parameters: ParameterSet, layer: str) -> Block:
    """Return where the parameters of a layer lie in the flat vector."""
    offsets = [offset for name, offset in parameters.offsets.items() if name.rpartition("/")[0] == layer]
    return Block(min(start for start, _ in offsets), max(stop for _, stop in offsets))
