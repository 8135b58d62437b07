"""Dropout on the device; its masks are the NumPy version's, bit for bit."""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import Array
from hpcnn.ops import check
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.launch import (
    BLOCKS_PER_PROCESSOR,
    VECTOR_BYTES,
    elementwise,
    empty_like,
    rows_grid,
    variant,
    vector_width,
)
from hpcnn.ops.cuda.types import suffix


def dropout_forward(
    x: Array, rate: float, stream: int, samples: np.ndarray, elements: np.ndarray
) -> tuple[Array, Array]:
    """See `hpcnn.ops.dropout_forward`.

    Sample indices are copied to the device; elements only where they are no stretch of neighbours.
    """
    y, mask = empty_like(x), empty_like(x, bool)
    if x.size == 0:
        return y, mask
    count, size = x.shape[0], elements.size
    first = int(elements[0])
    is_stretch = int(elements[-1]) == first + size - 1 and bool((elements[1:] > elements[:-1]).all())
    numbers = None if is_stretch else device().upload(np.ascontiguousarray(elements), np.uint64)
    width = vector_width(size, x, y, mask) if is_stretch else 1
    grid, block = rows_grid(count, size // width, rows_per_thread=1, per_processor=4 * BLOCKS_PER_PROCESSOR)
    device().launch(
        "dropout",
        f"dropout_forward_{variant(width)}_{suffix(x.dtype)}",
        grid,
        block,
        *(x, y, mask, device().upload(np.ascontiguousarray(samples), np.int64), numbers, np.uint64(first)),
        *(np.int64(count), np.int64(size), np.uint64(stream & (2**64 - 1)), np.float32(rate), _scale(rate)),
    )
    return y, mask


def dropout_backward(grad_output: Array, mask: Array, rate: float) -> Array:
    """See `hpcnn.ops.dropout_backward`."""
    grad_input = empty_like(grad_output)
    dtype = grad_output.dtype
    arrays = (grad_output, check.contiguous(mask), grad_input)
    elementwise("dropout", "dropout_backward", dtype, VECTOR_BYTES // dtype.itemsize, arrays, _scale(rate))
    return grad_input


def _scale(rate: float) -> np.float32:
    """Return what makes up for dropped numbers, as the NumPy version rounds it."""
    return np.float32(1.0 / (1.0 - rate))
