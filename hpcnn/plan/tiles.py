"""Where the tiles of layers begin and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from hpcnn.geometry import Block, blocks
from hpcnn.plan.layout import Layout
from hpcnn.spec import LayerSpec, ModelSpec


def tile_cuts(
    model: ModelSpec, layouts: Mapping[str, Layout]
) -> dict[str, tuple[tuple[Block, ...], tuple[Block, ...]]]:
    """Return the parts of rows and columns of layers that are cut into tiles.

    The tiles of a layer lie under those of the first layer that reads it, if that has the same grid: windows whose
    stride is their size then need nothing from a neighbour. Otherwise they are as equal as can be.
    """
    first_reader: dict[str, LayerSpec] = {}
    for layer in model.layers:
        for source in layer.inputs:
            first_reader.setdefault(source, layer)
    cuts: dict[str, tuple[tuple[Block, ...], tuple[Block, ...]]] = {}
    for layer in reversed(model.layers):
        layout, shape = layouts[layer.name], layer.output_shape
        if layout.height * layout.width == 1:
            continue
        reader = first_reader.get(layer.name)
        if reader is not None and reader.name in cuts and _same_tiles(layout, layouts[reader.name]):
            rows, columns = cuts[reader.name]
            down, across = getattr(reader, "stride", (1, 1))
            cuts[layer.name] = _under(rows, down, shape[0]), _under(columns, across, shape[1])
        else:
            cuts[layer.name] = blocks(shape[0], layout.height), blocks(shape[1], layout.width)
    return cuts


def _under(parts: Sequence[Block], step: int, size: int) -> tuple[Block, ...]:
    """Return the parts of an axis of `size` whose windows, `step` apart, begin in each of `parts`."""
    bounds = [0, *(min(part.stop * step, size) for part in parts[:-1]), size]
    return tuple(Block(start, stop) for start, stop in pairwise(bounds))


def _same_tiles(first: Layout, second: Layout) -> bool:
    return (first.height, first.width) == (second.height, second.width)
