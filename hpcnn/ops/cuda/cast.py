"""Changes of element type on the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcnn.arrays import Array
from hpcnn.ops.cuda.launch import elementwise, empty_like
from hpcnn.ops.cuda.types import suffix

_WIDTH = 4


def cast(x: Array, dtype: Any) -> Array:
    """See `hpcnn.ops.cast`."""
    if x.dtype == dtype:
        return x
    y = empty_like(x, dtype)
    origin = "u8" if x.dtype == np.uint8 else suffix(x.dtype)
    elementwise("cast", f"cast_{origin}", y.dtype, _WIDTH, (x, y))
    return y
