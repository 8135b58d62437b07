"""What Python and the kernels must agree on: element types, activations, and the structure of a convolution."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcnn.arrays import Padding, Pair, Shape
from hpcnn.arrays import bfloat16 as bfloat16

ACTIVATIONS = {None: np.int32(0), "relu": np.int32(1), "leaky_relu": np.int32(2)}
"""Activations by their numbers in `kernels/common.cuh`."""

CONV2D = np.dtype(
    [
        (name, np.int32)
        for name in (
            *("n", "h", "w", "c", "k", "r", "s", "p", "q"),
            *("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups"),
        )
    ]
)
"""`struct Conv2d` of `kernels/common.cuh`; passed by value, as an array without axes."""


def suffix(dtype: np.dtype[Any]) -> str:
    """Return how kernels name an element type: "f32" or "bf16"."""
    return "f32" if dtype == np.float32 else "bf16"


def conv2d(
    x_shape: Shape,
    weight_shape: Shape,
    y_shape: Shape,
    *,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> np.ndarray:
    """Return a `struct Conv2d`: x (N, H, W, C), weight (K, R, S, C / groups), y (N, P, Q, K)."""
    filters, rows, columns, _ = weight_shape
    numbers = (
        *(*x_shape, filters, rows, columns, y_shape[1], y_shape[2]),
        *(*stride, padding[0][0], padding[1][0], *dilation, groups),
    )
    return np.array(numbers, CONV2D)
