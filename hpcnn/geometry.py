"""Integers only: blocks of an index range, and the sizes of windows that slide over an image."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from hpcnn.arrays import Padding, Pair
from hpcnn.errors import ShapeError

NO_PADDING: Padding = ((0, 0), (0, 0))


class Block(NamedTuple):
    """A half-open index range."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of indices in the block."""
        return self.stop - self.start


def split(count: int, parts: int, index: int) -> Block:
    """Return part `index` of `count` items in `parts` contiguous blocks; the first `count % parts` get one more."""
    base, extra = divmod(count, parts)
    start = index * base + min(index, extra)
    return Block(start, start + base + (index < extra))


def blocks(count: int, parts: int) -> tuple[Block, ...]:
    """Return all parts of `split`, in order; they cover range(count) without overlap."""
    return tuple(split(count, parts, index) for index in range(parts))


def slices(box: tuple[Block, ...]) -> tuple[slice, ...]:
    """Return the index that cuts a block of every axis out of an array."""
    return tuple(slice(*block) for block in box)


def pair(value: int | Pair) -> Pair:
    """Return (rows, columns) from one number for both, or from a pair."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def four_sided(value: int | Pair | Padding) -> Padding:
    """Return ((top, bottom), (left, right)) from one number, from (rows, columns), or from itself."""
    if isinstance(value, int):
        return ((value, value), (value, value))
    first, second = value
    if isinstance(first, int) and isinstance(second, int):
        return ((first, first), (second, second))
    return (tuple(first), tuple(second))  # type: ignore[arg-type, return-value]


@lru_cache(4096)
def output_size(
    input_size: Pair, kernel_size: Pair, stride: Pair = (1, 1), padding: Padding = NO_PADDING, dilation: Pair = (1, 1)
) -> Pair:
    """Return the rows and columns (P, Q) that a window of `kernel_size` yields on an image of (H, W).

    Raises
    ------
    ShapeError
        If the padded image is smaller than the (dilated) window, or a parameter is out of range.
    """
    sizes = []
    for name, size, kernel, step, (before, after), spread in zip(
        ("H", "W"), input_size, kernel_size, stride, padding, dilation, strict=True
    ):
        if kernel < 1 or step < 1 or spread < 1 or before < 0 or after < 0:
            raise ShapeError(
                f"window: kernel (={kernel}), stride (={step}) and dilation (={spread}) along {name} must be at least 1"
                f" and padding (={before}, {after}) at least 0."
            )
        extent = (kernel - 1) * spread + 1
        room = size + before + after - extent
        if room < 0:
            raise ShapeError(
                f"window: {name} (={size}) with padding (={before}, {after}) is smaller than the window (={extent});"
                " it must fit at least once. Use a larger image, more padding or a smaller kernel."
            )
        sizes.append(room // step + 1)
    return sizes[0], sizes[1]
