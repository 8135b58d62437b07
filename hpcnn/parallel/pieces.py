"""Operations that begin before all of their input is there: the inside of a tile, while its halo travels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hpcnn import arrays
from hpcnn.arrays import Array, Shape
from hpcnn.nn.build import build
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer, Saved
from hpcnn.nn.model import Model
from hpcnn.plan.interior import early, interior
from hpcnn.plan.layout import Box, extent, within
from hpcnn.plan.placement import Placement, needs, padding
from hpcnn.spec import ConvSpec, LayerSpec, PoolSpec
from hpcnn.timeline import Timeline


class Piece(NamedTuple):
    """A box of the output: the layer with the padding that the box needs, where it reads, and where its output lies."""

    layer: Layer[Any]
    read: tuple[slice, ...]
    made: tuple[slice, ...]


@dataclass(frozen=True)
class Pieces:
    """The output of an operation in pieces: one of what this rank owns of the input, strips of what it fetches too."""

    layer: Layer[Any]
    source: str
    """The input."""
    shape: Shape
    """Of the output."""
    inside: Piece
    """Reads what this rank has made of the input."""
    strips: tuple[Piece, ...]
    """Read what this rank needs of the input."""

    def begin(self, value: Array, context: StepContext, timeline: Timeline) -> Array:
        """Return the output with its inside computed, given the input as far as this rank has made it."""
        output = arrays.empty(self.shape, value.dtype, like=value)
        with timeline.span(f"{self.layer.spec.name} forward, inside", "compute"):
            _compute(self.inside, value, output, context)
        return output

    def end(self, output: Array, x: Array, context: StepContext, timeline: Timeline) -> Saved:
        """Complete the output, given all of the input that is needed, and return what the layer saves."""
        with timeline.span(f"{self.layer.spec.name} forward, border", "compute"):
            for strip in self.strips:
                _compute(strip, x, output, context)
        return self.layer.save(x, output) if context.training else None


def _compute(piece: Piece, x: Array, output: Array, context: StepContext) -> None:
    output[piece.made] = piece.layer.forward((x[piece.read],), context)[0]


def make_pieces(model: Model, placement: Placement, rank: int) -> dict[str, Pieces]:
    """Return, by name, the pieces of the operations that `rank` had better begin before all of their input is there."""
    found = {}
    for spec, layer in zip(model.spec.layers, model.layers, strict=True):
        placed = placement.layers[spec.name]
        if placed.moved != (True,) or placed.partial != placed.computed:
            continue
        box, below = placed.computed[rank], placement.layers[spec.inputs[0]]
        if not early(spec, box, below.owned[rank]):
            continue
        inside, strips = interior(spec, box, below.owned[rank])
        boxes = ((inside, below.computed[rank]), *((strip, placed.needed[rank]) for strip in strips))
        first, *others = [
            Piece(padded(model, layer, spec, part), within(needs(spec, part), held), within(part, box))
            for part, held in boxes
        ]
        found[spec.name] = Pieces(layer, spec.inputs[0], extent(box), first, tuple(others))
    return found


def padded(model: Model, layer: Layer[Any], spec: LayerSpec, part: Box) -> Layer[Any]:
    """Return a layer of this rank with the padding of a part of its output; `spec` is the layer on all ranks."""
    if not isinstance(layer.spec, ConvSpec | PoolSpec):
        return layer
    return build(replace(layer.spec, padding=padding(spec, part)), model.parameters)
