"""How replicas of a network, one a group of ranks, are averaged; one file for each family of rules."""

from __future__ import annotations

from hpcnn.train.optimizers import Optimizer
from hpcnn.train.rules.mixing import Mixing
from hpcnn.train.rules.replicas import Replicas
from hpcnn.train.rules.rule import Record, Rule
from hpcnn.train.rules.weighted import Weighted
from hpcnn.train.setup import Parts

__all__ = ["Record", "Rule", "make_rule"]


def make_rule(parts: Parts, optimizer: Optimizer) -> Rule:
    """Return the rule that a configuration names; with one group there is nothing to average (collective).

    Raises
    ------
    PlanError
        If the plan cuts weights that are to be averaged by direction and length.
    """
    if parts.groups.count == 1:
        return Rule()
    replicas = Replicas(parts, optimizer)
    return Mixing(parts, replicas) if parts.config.average.rule == "mixing" else Weighted(parts, replicas)
