"""Boxes of an array to contiguous memory and back, as messages need them: halos, tiles, slices of channels.

A box is an index of an array of at most four axes: for each axis a slice with step one, or a pair (start, stop).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

import numpy as np

from hpcnn.arrays import Array
from hpcnn.errors import ShapeError
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.launch import LARGEST_GRID_Y, LARGEST_INT, THREADS, address
from hpcnn.ops.cuda.types import suffix

Box: TypeAlias = Sequence[slice | tuple[int, int]]

AXES = 4
MOST_BOXES = 16
"""Boxes of one launch."""
UNITS = (16, 8, 4, 2, 1)

BOX = np.dtype([("at", np.int64), ("piece", np.int64), ("extents", np.int32, AXES)])
BOXES = np.dtype([("strides", np.int64, AXES - 1), ("boxes", BOX, MOST_BOXES)])
"""`struct Boxes` of `kernels/box.cu`."""


class _Region(NamedTuple):
    """A box in elements, its trailing axes merged where it takes all of them."""

    at: int
    strides: tuple[int, ...]
    extents: tuple[int, ...]
    piece: int


def pack(x: Array, box: Box) -> Array:
    """Return a C-ordered copy of a box of `x`.

    Parameters
    ----------
    x : Array
        C-ordered, of at most four axes and elements of 1, 2, 4 or 8 bytes.
    box : sequence of slices or of pairs (start, stop)
        One for each axis.

    Raises
    ------
    ShapeError
        If the box does not lie in the array.
    """
    piece = device().empty(tuple(stop - start for start, stop in _ranges(x, box)), x.dtype)
    pack_all(x, [box], piece.reshape(-1))
    return piece


def unpack(y: Array, box: Box, piece: Array, add: bool = False) -> None:
    """Write `piece`, C-ordered and of the box's shape, into a box of `y`, or add it to what is there.

    Raises
    ------
    ShapeError
        If the box does not lie in the array, or `piece` has another shape or type.
    """
    shape = tuple(stop - start for start, stop in _ranges(y, box))
    if tuple(piece.shape) != shape:
        raise ShapeError(f"box: piece has shape {tuple(piece.shape)}; the box has {shape}.")
    unpack_all(y, [box], piece.reshape(-1), add)


def pack_all(x: Array, boxes: Sequence[Box], flat: Array) -> None:
    """Copy boxes of `x` one after the other into `flat`, a contiguous array without further axes."""
    for regions in _groups(_regions(x, boxes, flat), MOST_BOXES):
        unit = _unit(x, flat, regions, UNITS)
        _launch(f"box_pack_{unit}", x, flat, regions, unit)


def unpack_all(y: Array, boxes: Sequence[Box], flat: Array, add: bool = False) -> None:
    """Write the pieces that follow each other in `flat` into boxes of `y`, or add them to what is there.

    Boxes that are written must not overlap; boxes that are added may, and are added one after the other.
    """
    for regions in _groups(_regions(y, boxes, flat), 1 if add else MOST_BOXES):
        if not add:
            unit = _unit(y, flat, regions, UNITS)
            _launch(f"box_unpack_{unit}", y, flat, regions, unit)
            continue
        itemsize = y.dtype.itemsize
        kind = "f64" if y.dtype == np.float64 else suffix(y.dtype)
        unit = _unit(y, flat, regions, (16, itemsize) if kind != "f64" else (itemsize,))
        _launch(f"box_add_{'vector' if unit > itemsize else 'scalar'}_{kind}", y, flat, regions, unit)


def _ranges(x: Array, box: Box) -> list[tuple[int, int]]:
    """Return (start, stop) along each axis; raises where they leave the array."""
    if len(box) != x.ndim or x.ndim > AXES:
        raise ShapeError(f"box: {len(box)} ranges for an array of {x.ndim} axes; there is one an axis, at most {AXES}.")
    ranges = []
    for extent, part in zip(x.shape, box, strict=True):
        start, stop, step = part.indices(extent) if isinstance(part, slice) else (*part, 1)
        if not 0 <= start <= stop <= extent or step != 1:
            raise ShapeError(f"box: {part} of an axis of {extent}; it must lie inside, without steps.")
        ranges.append((start, stop))
    return ranges


def _regions(x: Array, boxes: Sequence[Box], flat: Array) -> list[_Region]:
    """Return the boxes that hold anything; raises unless `flat` has exactly room for them."""
    regions, filled = [], 0
    for box in boxes:
        ranges = _ranges(x, box)
        regions.append(_region(x.shape, ranges, filled))
        filled += prod(stop - start for start, stop in ranges)
    if flat.shape != (filled,) or flat.dtype != x.dtype:
        raise ShapeError(
            f"box: the flat array is {flat.dtype} of shape {tuple(flat.shape)}; it must be {x.dtype} of ({filled},)."
        )
    return [region for region in regions if prod(region.extents)]


def _region(shape: Sequence[int], ranges: Sequence[tuple[int, int]], piece: int) -> _Region:
    """Return a box with its last axis as long as memory is contiguous."""
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    at = sum(start * stride for (start, _), stride in zip(ranges, strides, strict=True))
    extents = [stop - start for start, stop in ranges]
    while len(extents) > 1 and extents[-1] == shape[len(extents) - 1]:
        run = extents.pop()
        extents[-1] *= run
        strides.pop(-2)
        shape = (*shape[: len(extents) - 1], shape[len(extents) - 1] * run)
    outer = AXES - len(extents)
    return _Region(at, (0,) * outer + tuple(strides[:-1]), (1,) * outer + tuple(extents), piece)


def _groups(regions: list[_Region], most: int) -> Iterator[list[_Region]]:
    """Yield regions that go into one launch: neighbours of equal strides, at most so many."""
    group: list[_Region] = []
    for region in regions:
        if group and (len(group) == most or region.strides != group[0].strides):
            yield group
            group = []
        group.append(region)
    if group:
        yield group


def _unit(x: Array, flat: Array, regions: list[_Region], units: Sequence[int]) -> int:
    """Return the largest unit, in bytes, that everything is a multiple of."""
    itemsize = x.dtype.itemsize
    numbers = [address(x), address(flat)]
    for region in regions:
        numbers += [n * itemsize for n in (region.at, region.piece, region.extents[-1], *region.strides)]
    return next(unit for unit in units if all(number % unit == 0 for number in numbers))


def _launch(kernel: str, x: Array, flat: Array, regions: list[_Region], unit: int) -> None:
    """Launch a kernel over regions of equal strides, in units."""

    def units(count: int) -> int:
        return count * x.dtype.itemsize // unit

    longest = max(units(region.extents[-1]) for region in regions)
    lines = max(prod(region.extents[:-1]) for region in regions)
    if max(longest, lines) > LARGEST_INT:
        raise ShapeError(f"box: {lines} runs of {longest} x {unit} bytes are too many for one box. Use smaller boxes.")
    arguments = np.zeros((), BOXES)
    arguments["strides"] = [units(stride) for stride in regions[0].strides]
    for index, region in enumerate(regions):
        extents = (*region.extents[:-1], units(region.extents[-1]))
        arguments["boxes"][index] = (units(region.at), units(region.piece), extents)
    threads = min(THREADS, 1 << (longest - 1).bit_length())
    block = (threads, THREADS // threads)
    most = 16 * device().num_processors
    across = min(-(-longest // threads), most)
    grid = (across, min(-(-lines // block[1]), max(1, most // across), LARGEST_GRID_Y), len(regions))
    device().launch("box", kernel, grid, block, x, flat, arguments)
