"""Which part of what a rank computes depends only on what it owns of the input, and need not wait for the rest."""

from __future__ import annotations

from hpcnn.geometry import Block
from hpcnn.plan.layout import Box, contains, intersect, volume
from hpcnn.plan.placement import may_miss, needs
from hpcnn.spec import ConvSpec, LayerSpec, LinearSpec

LEAST_INTERIOR = {ConvSpec: 0.9, LinearSpec: 0.5}
"""Part of an output that must lie inside for it to be run in pieces. These cost copies, and small ones more time a
position: of a convolution 1 to 10 % as measured, but a fifth where strips are a seventh of the output, and more where
they are more. A fully connected layer reads its weights once more."""


def interior(layer: LayerSpec, box: Box, owned: Box) -> tuple[Box, tuple[Box, ...]]:
    """Return what of `box` a layer makes of `owned` of its input alone, and the strips around that.

    The interior is the largest box of positions whose windows lie in `owned`; it is empty where there is none, and for
    layers that are not run in pieces. It and the strips cover `box` once. Strips are those before and after it along
    samples, rows and columns, as far as there are any: of tiles four, top, bottom, left and right.
    """
    inner = [Block(0, 0)] * len(box)
    if isinstance(layer, LinearSpec) or (isinstance(layer, ConvSpec) and not may_miss(layer)):
        inner = [*intersect(box[:1], owned[:1]), *box[1:]]
    if isinstance(layer, ConvSpec) and volume(box):
        for axis in range(2):
            inner[1 + axis] = _inner(layer, axis, box[1 + axis], owned[1 + axis])
    if not volume(tuple(inner)) or not contains(owned, needs(layer, tuple(inner))):
        return (Block(0, 0),) * len(box), (box,)
    strips = []
    for axis, (part, whole) in enumerate(zip(inner, box, strict=True)):
        edges = Block(whole.start, part.start), Block(part.stop, whole.stop)
        strips += [(*inner[:axis], edge, *box[axis + 1 :]) for edge in edges if edge.size]
    return tuple(inner), tuple(strips)


def early(layer: LayerSpec, box: Box, owned: Box) -> float:
    """Return which part of `box` is computed before all of the input is there; 0 where that is not worth it."""
    inside, strips = interior(layer, box, owned)
    share = volume(inside) / max(1, volume(box))
    return share if strips and share >= LEAST_INTERIOR.get(type(layer), 1.0) else 0.0


def _inner(layer: ConvSpec, axis: int, block: Block, owned: Block) -> Block:
    """Return which positions of `block` have windows that lie in `owned`, or beside the image, along an axis."""
    step, before, size = layer.stride[axis], layer.padding[axis][0], layer.input_shape[axis]
    reach = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
    start = block.start if owned.start == 0 else max(block.start, -(-(owned.start + before) // step))
    stop = block.stop if owned.stop == size else min(block.stop, (owned.stop + before - reach) // step + 1)
    return Block(start, max(start, stop))
