"""What one training step of a plan costs each rank: numbers to hold and to compute (`exchanges` has what it sends)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hpcnn.plan.buckets import FLOAT_BYTES
from hpcnn.plan.layout import volume
from hpcnn.plan.placement import Placement
from hpcnn.plan.planner import Plan
from hpcnn.plan.turns import turn_boxes
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
    moved_bytes: int
    """Fetched from other ranks in forward, by the rank that fetches most of rank 0, the middle and the last; gradients
    go back by the same ways."""


def layer_costs(model: ModelSpec, plan: Plan) -> tuple[LayerCost, ...]:
    """Return the costs of every layer on rank 0, whose share of an uneven batch is the largest.

    Flops count forward, input gradient (not for layers that read only the images) and weight gradient; in turns
    forward twice, and what several tiles compute each time.
    """
    costs = []
    placement = plan.place(model, plan.global_batch)
    placed = placement.layers
    in_turns = _made_in_turns(model, plan, placement)
    for layer, part, (_, layout) in zip(model.layers, plan.parts(model, 0), plan.layouts, strict=True):
        there, back = (
            in_turns.get(layer.name, volume(boxes[0])) / prod(layer.output_shape) / layout.inner
            for boxes in (placed[layer.name].partial, placed[layer.name].made_back)
        )
        there *= 1 + (layer.name in in_turns)  # once more in backward
        passes_back = 1 if layer.inputs == (INPUT,) else 2
        costs.append(
            LayerCost(
                name=layer.name,
                kind=kind_of(layer),
                layout=layout.name,
                output_shape=layer.output_shape,
                num_parameters=part.spec.num_parameters,
                activation_bytes=volume(placed[layer.name].computed[0]) * FLOAT_BYTES,
                flops=round((there + passes_back * back) * layer.forward_flops),
                moved_bytes=FLOAT_BYTES * _most_fetched(placement, layer, plan.ranks),
            )
        )
    return tuple(costs)


def _made_in_turns(model: ModelSpec, plan: Plan, placement: Placement) -> dict[str, int]:
    """Return the elements of output that rank 0 makes of each layer in a group, those made twice counted twice."""
    made: dict[str, int] = {}
    for group in plan.groups(model):
        for boxes in turn_boxes(group, placement.layers[group.name].computed[0]):
            for layer, box in zip(group.layers, boxes[1:], strict=True):
                made[layer.name] = made.get(layer.name, 0) + volume(box)
    return made


def _most_fetched(placement: Placement, layer: LayerSpec, ranks: int) -> int:
    """Return the elements that a rank needs of the layer's inputs, or of partial sums, and has not computed itself."""
    moved = [
        placement.movement(layer.name, source)
        for source, moves in zip(layer.inputs, placement.layers[layer.name].moved, strict=True)
        if moves
    ]
    looked_at = {0, ranks // 2, ranks - 1}
    sums = placement.summing(layer.name)
    return max(
        sum(volume(way.target[rank]) - volume(way.kept(rank)) for way in moved)
        + (sums.num_elements_sent(rank) if sums else 0)  # on the way back it receives as many
        for rank in looked_at
    )


def kind_of(layer: LayerSpec) -> str:
    """Return the word for a layer's kind in tables: "conv", "linear", "batchnorm" ..."""
    return type(layer).__name__.removesuffix("Spec").lower()
