"""Sums that go down the rows of a matrix: bias gradients, and the partial sums of a product that was cut in depth."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Shape
from hpcnn.ops.cuda import types
from hpcnn.ops.cuda.device import GIVEN, Launch, device, remembered

THREADS = 256
COLUMNS, LANES = 32, 8
"""Threads of a block of `column_sum`: along the columns, and side by side down the rows."""


def column_sums(x: Array, out: Array | None = None) -> Array:
    """Return the sums of x (M, K), float32 or bfloat16, over its rows: float32 (K,), the same bits every time."""
    columns = x.shape[1]
    out = device().empty((columns,), np.float32) if out is None else out
    splits, launch = _sums(x.shape, x.dtype)
    target = out if splits == 1 else device().empty((splits, columns), np.float32)
    launch(x, target)
    if splits > 1:
        reduce_partials(target, splits, out)
    return out


def reduce_partials(
    partials: Array, splits: int, out: Array, bias: Array | None = None, activation: str | None = None
) -> None:
    """Put activation(sum over splits + bias) into `out`, adding in the order of the splits.

    Parameters
    ----------
    partials : Array
        float32, `splits` times as many as `out` has elements, split by split.
    splits : int
        At least 1.
    out : Array, shape (..., K)
        float32 or bfloat16, C-ordered; overwritten.
    bias : Array, shape (K,), optional
        float32.
    activation : {"relu", "leaky_relu"}, optional
        Applied last.
    """
    _reduction(out.shape, out.dtype, splits, activation)(partials, bias, out)


@remembered
def _sums(shape: Shape, dtype: Any) -> tuple[int, Launch]:
    """Return in how many parts to sum the rows of a matrix, and the kernel that does it."""
    rows, columns = shape
    across = -(-columns // COLUMNS)
    wanted = -(-8 * device().num_processors // across)
    splits = max(1, min(wanted, -(-rows // (4 * LANES)), 1024))
    args = (GIVEN, GIVEN, np.int64(rows), np.int32(columns))
    kernel = f"column_sum_{types.suffix(dtype)}"
    return splits, device().prepare("column_sum", kernel, (across, splits), (COLUMNS, LANES), *args)


@remembered
def _reduction(shape: Shape, dtype: Any, splits: int, activation: str | None) -> Launch:
    """Return the kernel of `reduce_partials`."""
    count = prod(shape)
    numbers = (np.int64(count), np.int32(splits), np.int32(shape[-1]), types.ACTIVATIONS[activation])
    kernel = f"reduce_partials_{types.suffix(dtype)}"
    blocks = -(-count // THREADS)
    return device().prepare("column_sum", kernel, (blocks,), (THREADS,), GIVEN, GIVEN, GIVEN, *numbers)
