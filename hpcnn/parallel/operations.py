"""The operations of a program: a model's layers as they run, and which values each is the last to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcnn.errors import PlanError
from hpcnn.geometry import Block
from hpcnn.nn.layer import Layer
from hpcnn.nn.model import Model
from hpcnn.nn.partial import PartialSum
from hpcnn.parallel.turns import Turns
from hpcnn.plan.layout import volume
from hpcnn.plan.planner import Plan
from hpcnn.spec import BatchNormSpec, ModelSpec


@dataclass(frozen=True)
class Operation:
    """One local layer: which values it reads, which it makes, and which it is the last to read.

    Layers that are computed in turns are one operation: `first` is the one that reads, `trained` are all of them that
    have parameters.
    """

    layer: Layer[Any]
    inputs: tuple[str, ...]
    output: str
    first: str
    trained: tuple[str, ...]
    last_use: tuple[str, ...]
    needs_input_gradient: bool


def compile_operations(model: Model, turns: Mapping[str, Turns] | None = None) -> tuple[Operation, ...]:
    """Return the model's layers as operations, those in groups of `turns` as one each, in the last layer's place.

    Each knows which values die with it, and whether its input needs a gradient: the images do not.
    """
    groups = turns or {}
    inner = {layer.name for group in groups.values() for layer in group.spec.layers[:-1]}
    layers = [groups.get(layer.spec.name, layer) for layer in model.layers if layer.spec.name not in inner]
    last_reader: dict[str, str] = {}
    trained_above: set[str] = set()
    for layer in layers:
        for name in layer.spec.inputs:
            last_reader[name] = layer.spec.name
        if layer.parameters or trained_above.intersection(layer.spec.inputs):
            trained_above.add(layer.spec.name)
    members = {name: group.spec.layers for name, group in groups.items()}
    return tuple(
        Operation(
            layer=layer,
            inputs=layer.spec.inputs,
            output=layer.spec.name,
            first=members.get(layer.spec.name, (layer.spec,))[0].name,
            trained=tuple(spec.name for spec in members.get(layer.spec.name, (layer.spec,)) if spec.parameters),
            last_use=tuple(name for name, reader in last_reader.items() if reader == layer.spec.name),
            needs_input_gradient=bool(trained_above.intersection(layer.spec.inputs)),
        )
        for layer in layers
    )


def refuse_cut_features(layer: str, spec: ModelSpec, plan: Plan, operations: Sequence[Operation]) -> None:
    """Raise PlanError if any rank computes a loss of samples of which it lacks some outputs of `layer`."""
    placement = plan.place(spec, plan.global_batch)
    placed = placement.layers[layer]
    shape = next(one.output_shape for one in spec.layers if one.name == layer)
    for loss, *boxes in zip(placement.loss, placed.partial, placed.computed, placed.made_back, strict=True):
        needed = (loss[0], *(Block(0, size) for size in shape))
        lacking = any(box != needed and (volume(box) or volume(needed)) for box in boxes)
        if lacking or all(operation.output != layer for operation in operations):
            raise PlanError(
                f"plan: the loss of features (separation.method) needs all outputs of layer '{layer}' where the loss of"
                " a sample is computed, but the plan cuts or moves them, or computes them in turns. Set"
                ' plan.preset = "data", or name a layer that is whole by separation.layer.'
            )


def refuse_local_statistics(spec: ModelSpec, plan: Plan) -> None:
    """Raise PlanError if a rank's own samples are not enough for the statistics of a batch norm."""
    for layer, (_, layout) in zip(spec.layers, plan.layouts, strict=True):
        local = layout.height * layout.width == 1 and layout.ranks == plan.ranks
        local = local and layout.sample <= plan.global_batch
        if isinstance(layer, BatchNormSpec) and not local:
            raise PlanError(
                f"plan: layer '{layer.name}' is a batch norm with a grid {layout.grid} of tiles, or one that leaves"
                f" some of {plan.ranks} ranks without samples: its statistics must be those of the whole batch."
                " Set model.sync_batchnorm = true."
            )


def refuse_narrow(operations: Sequence[Operation], activation: np.dtype[Any]) -> None:
    """Raise PlanError for what is not proven right with 16-bit activations: sums of parts, and turns."""
    if activation.itemsize >= 4:
        return
    for operation in operations:
        if isinstance(operation.layer, PartialSum | Turns):
            raise PlanError(
                f"plan: layer '{operation.output}' adds up parts, by input channels or in turns, which needs"
                f' activations of 32 bits (these are {activation}). Set train.compute = "tf32", or another plan.'
            )
