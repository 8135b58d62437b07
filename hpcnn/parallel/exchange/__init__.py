"""How gradients travel: one file a kind of exchange, all behind the events of `base.Exchange`."""

from __future__ import annotations

from hpcnn.comm.world import World
from hpcnn.config import ExchangeConfig
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.exchange.allreduce import AllreduceExchange
from hpcnn.parallel.exchange.base import Exchange, SerialExchange
from hpcnn.spec import ModelSpec

__all__ = ["AllreduceExchange", "Exchange", "SerialExchange", "make_exchange"]


def make_exchange(config: ExchangeConfig, model: ModelSpec, parameters: ParameterSet, world: World) -> Exchange:
    """Return the exchange that the configuration names; on one rank nothing travels."""
    if world.size == 1:
        return SerialExchange(parameters)
    return AllreduceExchange(config, model, parameters, world)
