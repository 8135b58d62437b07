"""Fully connected layers in NumPy: one GEMM each."""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import empty
from hpcnn.ops.cpu.activation import activate
from hpcnn.ops.cpu.blocks import column_sums


def linear_forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, activation: str | None = None
) -> np.ndarray:
    """See `hpcnn.ops.linear_forward`."""
    y = np.matmul(x, weight.T, out=empty((x.shape[0], weight.shape[0]), x.dtype))
    if bias is not None:
        y += bias
    activate(y, activation, y)
    return y


def linear_backward_input(grad_output: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """See `hpcnn.ops.linear_backward_input`."""
    return np.matmul(grad_output, weight, out=empty((grad_output.shape[0], weight.shape[1]), weight.dtype))


def linear_backward_weight(
    x: np.ndarray,
    grad_output: np.ndarray,
    *,
    bias: bool = True,
    out: tuple[np.ndarray, np.ndarray | None] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """See `hpcnn.ops.linear_backward_weight`."""
    outputs = grad_output.shape[1]
    grad_weight, grad_bias = out if out is not None else (empty((outputs, x.shape[1]), x.dtype), None)
    np.matmul(grad_output.T, x, out=grad_weight)
    return grad_weight, bias_gradient(grad_output, grad_bias) if bias else None


def bias_gradient(grad_output: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """Return the sums of `grad_output` (M, O) over its rows, in `out` where that is given."""
    out = empty(grad_output.shape[1], grad_output.dtype) if out is None else out
    out[...] = column_sums(grad_output)
    return out
