"""Sums that go down the rows of a matrix: bias gradients, and the partial sums of a product that was cut in depth."""

from __future__ import annotations

from math import prod

import numpy as np

from hpcnn.arrays import Array
from hpcnn.ops.cuda import types
from hpcnn.ops.cuda.device import device

THREADS = 256
COLUMNS, LANES = 32, 8
"""Threads of a block of `column_sum`: along the columns, and side by side down the rows."""


def column_sums(x: Array, out: Array | None = None) -> Array:
    """Return the sums of x (M, K), float32 or bfloat16, over its rows: float32 (K,), the same bits every time."""
    rows, columns = x.shape
    out = device().empty((columns,), np.float32) if out is None else out
    across = -(-columns // COLUMNS)
    wanted = -(-8 * device().num_processors // across)
    splits = max(1, min(wanted, -(-rows // (4 * LANES)), 1024))
    target = out if splits == 1 else device().empty((splits, columns), np.float32)
    kernel = f"column_sum_{types.suffix(x.dtype)}"
    args = (x, target, np.int64(rows), np.int32(columns))
    device().launch("column_sum", kernel, (across, splits), (COLUMNS, LANES), *args)
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
    count = prod(out.shape)
    kernel = f"reduce_partials_{types.suffix(out.dtype)}"
    numbers = (np.int64(count), np.int32(splits), np.int32(out.shape[-1]), types.ACTIVATIONS[activation])
    device().launch("column_sum", kernel, (-(-count // THREADS),), (THREADS,), partials, bias, out, *numbers)
