"""What one rank has of a layer: the layer as it computes it, and its parts of the parameters."""

from __future__ import annotations

from dataclasses import replace

from hpcnn.plan.layout import Box, Layout, volume
from hpcnn.plan.placement import needs, padding
from hpcnn.spec import (
    BatchNormSpec,
    ConvSpec,
    LayerSpec,
    LinearSpec,
    Part,
    PartialSumSpec,
    PoolSpec,
    ShortcutSpec,
    whole,
)


def part(layer: LayerSpec, layout: Layout, box: Box, rank: int) -> Part:
    """Return what of a layer `rank` has, to compute `box` of the output of batches of any size.

    Parameters
    ----------
    box : Box
        What it computes, partial sums perhaps; where there are no rows and columns the layer is never run.
    """
    made = layout.output_channels(rank, layer.output_shape[-1], owned=False)
    read = layout.input_channels(rank, layer.input_shape[-1])
    own = layout.output_channels(rank, layer.output_shape[-1])
    local: LayerSpec
    match layer:
        case ConvSpec():
            shape = (*layer.input_shape[:2], read.size)
            local = replace(layer, input_shape=shape, out_channels=made.size, padding=padding(layer, box))
        case PoolSpec():
            local = replace(layer, padding=padding(layer, box))
        case LinearSpec():
            local = replace(layer, input_shape=(read.size,), out_features=made.size)
        case ShortcutSpec() if volume(box):
            shape = (*layer.input_shape[:2], needs(layer, box)[3].size)
            local = replace(layer, input_shape=shape, out_channels=own.size)
        case BatchNormSpec():
            local = replace(layer, input_shape=(*layer.input_shape[:-1], own.size))
        case _:
            local = layer
    if layout.inner > 1 and isinstance(local, ConvSpec | LinearSpec):
        local = PartialSumSpec(
            name=layer.name,
            inputs=layer.inputs,
            input_shape=local.input_shape,
            product=replace(local, bias=False, activation=None),
            num_completed=own.size,
            bias=local.bias,
            activation=local.activation,
        )
    tensors = whole(layer).tensors
    if layout.cut > 1:
        tensors = {
            short: (made, *everything[1:-1], read) if short == "weight" else (own,)
            for short, everything in tensors.items()
        }
    return Part(local, box[1:], tensors)
