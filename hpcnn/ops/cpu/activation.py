"""ReLU, leaky ReLU and sums in NumPy."""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import empty_like
from hpcnn.ops.cpu.blocks import row_blocks

LEAKY_SLOPE = 0.1
"""Slope of the leaky ReLU below zero."""


def activate(x: np.ndarray, kind: str | None, out: np.ndarray) -> None:
    """Write the activation of `x` to `out`, which may be `x` itself; meant for blocks that are in cache."""
    if kind == "relu":
        np.maximum(x, 0, out=out)
    elif kind == "leaky_relu":
        np.maximum(x, x * x.dtype.type(LEAKY_SLOPE), out=out)
    elif out is not x:
        out[...] = x


def gate(grad: np.ndarray, positive: np.ndarray, kind: str, out: np.ndarray) -> None:
    """Write to `out` the gradient `grad` as it passes an activation whose output is `positive` (bool)."""
    if kind == "relu":
        np.multiply(grad, positive, out=out)
    else:
        slopes = np.asarray([LEAKY_SLOPE, 1.0], grad.dtype)
        np.multiply(grad, slopes.take(positive.view(np.uint8)), out=out)


def activation_forward(x: np.ndarray, kind: str) -> np.ndarray:
    """See `hpcnn.ops.activation_forward`."""
    y = empty_like(x)
    source, target = x.reshape(-1), y.reshape(-1)
    for block in row_blocks(source.size, 1):
        activate(source[block], kind, target[block])
    return y


def activation_backward(grad_output: np.ndarray, y: np.ndarray, kind: str) -> np.ndarray:
    """See `hpcnn.ops.activation_backward`."""
    grad_input = empty_like(y)
    grad, output, target = grad_output.reshape(-1), y.reshape(-1), grad_input.reshape(-1)
    for block in row_blocks(output.size, 1):
        gate(grad[block], output[block] > 0, kind, target[block])
    return grad_input


def add_forward(a: np.ndarray, b: np.ndarray, activation: str | None = None) -> np.ndarray:
    """See `hpcnn.ops.add_forward`."""
    y = empty_like(a)
    left, right, target = a.reshape(-1), b.reshape(-1), y.reshape(-1)
    for block in row_blocks(left.size, 1):
        np.add(left[block], right[block], out=target[block])
        if activation is not None:
            activate(target[block], activation, target[block])
    return y
