"""ReLU, leaky ReLU and sums, one pass over memory each."""

from __future__ import annotations

from hpcnn.arrays import Array
from hpcnn.ops.cuda.launch import VECTOR_BYTES, elementwise, empty_like
from hpcnn.ops.cuda.types import ACTIVATIONS


def activation_forward(x: Array, kind: str) -> Array:
    """See `hpcnn.ops.activation_forward`."""
    y = empty_like(x)
    _launch("activation_forward", kind, x, y)
    return y


def activation_backward(grad_output: Array, y: Array, kind: str) -> Array:
    """See `hpcnn.ops.activation_backward`."""
    grad_input = empty_like(y)
    _launch("activation_backward", kind, grad_output, y, grad_input)
    return grad_input


def add_forward(a: Array, b: Array, activation: str | None = None) -> Array:
    """See `hpcnn.ops.add_forward`; rounded once, behind the activation."""
    y = empty_like(a)
    _launch("add_forward", activation, a, b, y)
    return y


def _launch(kernel: str, kind: str | None, *arrays: Array) -> None:
    dtype = arrays[0].dtype
    elementwise("activation", kernel, dtype, VECTOR_BYTES // dtype.itemsize, arrays, ACTIVATIONS[kind])
