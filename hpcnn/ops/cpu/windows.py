"""Windows that slide over images, as views.

Legend: N samples, H W rows and columns, C channels, R S window rows and columns, P Q output rows and columns.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from hpcnn.arrays import Padding, Pair, empty
from hpcnn.geometry import output_size


def pad(x: np.ndarray, padding: Padding) -> np.ndarray:
    """Return `x` (N, H, W, C) with zeros around each image, or itself without padding."""
    (top, bottom), (left, right) = padding
    count, rows, columns, channels = x.shape
    if not (top or bottom or left or right):
        return x
    padded = empty((count, top + rows + bottom, left + columns + right, channels), x.dtype)
    padded[:, :top] = 0
    padded[:, top + rows :] = 0
    padded[:, top : top + rows, :left] = 0
    padded[:, top : top + rows, left + columns :] = 0
    padded[:, top : top + rows, left : left + columns] = x
    return padded


def windows(x: np.ndarray, kernel_size: Pair, stride: Pair, dilation: Pair) -> np.ndarray:
    """Return a read-only view (N, P, Q, R, S, C) of the windows of `x` (N, H, W, C)."""
    count, height, width, channels = x.shape
    # output_size proves that no window reaches past the array, which as_strided does not check.
    size = output_size((height, width), kernel_size, stride, dilation=dilation)
    along_n, along_h, along_w, along_c = x.strides
    strides = (
        along_n,
        along_h * stride[0],
        along_w * stride[1],
        along_h * dilation[0],
        along_w * dilation[1],
        along_c,
    )
    return as_strided(x, (count, *size, *kernel_size, channels), strides, writeable=False)
