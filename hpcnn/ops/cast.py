"""Changes of element type: between float32 and bfloat16, and from the bytes of images."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcnn.arrays import Array, empty
from hpcnn.errors import ShapeError
from hpcnn.ops import check
from hpcnn.ops.backend import BFLOAT16

FROM = ("float32", "uint8", BFLOAT16)
TO = ("float32", BFLOAT16)


def cast(x: Array, dtype: Any) -> Array:
    """Return an array of the same numbers in another element type, rounded to nearest, ties to even.

    Parameters
    ----------
    x : Array of float32, bfloat16 or uint8
        Of any shape.
    dtype : dtype
        float32 or bfloat16 (ml_dtypes' type).

    Returns
    -------
    Array, shape of x
        `x` itself if it has the type already.

    Raises
    ------
    ShapeError
        If there is no such change.
    """
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    # By name: bfloat16 is known only where ml_dtypes is installed.
    if x.dtype.name not in FROM or dtype.name not in TO:
        raise ShapeError(f"cast: {x.dtype} to {dtype}; casts are from {', '.join(FROM)} to {' or '.join(TO)}.")
    if not isinstance(x, np.ndarray):
        from hpcnn.ops.cuda import cast as cuda  # imported here: few runs have a GPU

        return cuda.cast(check.contiguous(x), dtype)
    y = empty(x.shape, dtype)
    y[...] = x
    return y
