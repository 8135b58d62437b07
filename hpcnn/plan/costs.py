"""What one training step of a plan costs each rank: numbers to hold and to compute (`exchanges` has what it sends)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hpcnn.plan.buckets import FLOAT_BYTES
from hpcnn.plan.planner import Plan
from hpcnn.spec import INPUT, LayerSpec, ModelSpec


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer on the most loaded rank, for one training step."""

    name: str
    kind: str
    layout: str
    output_shape: tuple[int, ...]
    num_parameters: int
    activation_bytes: int
    flops: int


def layer_costs(model: ModelSpec, plan: Plan) -> tuple[LayerCost, ...]:
    """Return the costs of every layer on rank 0, whose share of an uneven batch is the largest.

    Flops count forward, input gradient (not for layers that read only the images) and weight gradient.
    """
    costs = []
    for layer, (_, layout) in zip(model.layers, plan.layouts, strict=True):
        samples = layout.samples(0, plan.global_batch).size
        passes = 2 if layer.inputs == (INPUT,) else 3
        costs.append(
            LayerCost(
                name=layer.name,
                kind=kind_of(layer),
                layout=layout.name,
                output_shape=layer.output_shape,
                num_parameters=layer.num_parameters,
                activation_bytes=samples * prod(layer.output_shape) * FLOAT_BYTES,
                flops=passes * samples * layer.forward_flops,
            )
        )
    return tuple(costs)


def kind_of(layer: LayerSpec) -> str:
    """Return the word for a layer's kind in tables: "conv", "linear", "batchnorm" ..."""
    return type(layer).__name__.removesuffix("Spec").lower()
