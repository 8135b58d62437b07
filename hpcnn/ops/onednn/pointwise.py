"""ReLU, leaky ReLU and sums by oneDNN, one pass over memory each."""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import empty_like
from hpcnn.ops import cpu
from hpcnn.ops.cpu.activation import activate
from hpcnn.ops.onednn import library as lib
from hpcnn.ops.onednn.primitive import (
    Description,
    PostOp,
    Primitive,
    address,
    attributes,
    cached,
    data_type,
    plain,
    relu,
    slope,
    vector,
)

_ZERO = np.zeros(1, np.float32)


def activation_forward(x: np.ndarray, kind: str) -> np.ndarray:
    """See `hpcnn.ops.activation_forward`."""
    primitive = _activation(x.size, data_type(x), kind)
    if primitive is None:
        return cpu.activation_forward(x, kind)
    x, y = plain(x), empty_like(x)
    primitive(address(x), address(y))
    return y


def activation_inplace(y: np.ndarray, kind: str) -> None:
    """Apply an activation to an array of this implementation's own making, in place."""
    primitive = _activation(y.size, data_type(y), kind)
    if primitive is None:
        activate(y, kind, y)
    else:
        primitive(address(y), address(y))


def activation_backward(grad_output: np.ndarray, y: np.ndarray, kind: str) -> np.ndarray:
    """See `hpcnn.ops.activation_backward`."""
    primitive = _activation_backward(y.size, data_type(y), kind)
    if primitive is None:
        return cpu.activation_backward(grad_output, y, kind)
    grad_output, y, grad_input = plain(grad_output), plain(y), empty_like(y)
    primitive(address(y), address(_ZERO), address(grad_input), address(grad_output))
    return grad_input


def add_forward(a: np.ndarray, b: np.ndarray, activation: str | None = None) -> np.ndarray:
    """See `hpcnn.ops.add_forward`."""
    primitive = _add(a.size, data_type(a), activation)
    if primitive is None:
        return cpu.add_forward(a, b, activation)
    a, b, y = plain(a), plain(b), empty_like(a)
    primitive(address(a), address(b), address(y))
    return y


@cached
def _activation(size: int, dtype: int, kind: str) -> Primitive:
    """Return y = f(x)."""
    flat = vector(size, dtype)
    arguments = (lib.FORWARD, lib.RELU, flat, flat, slope(kind), 0.0, attributes())
    return Primitive(Description(f"{kind} of {size}", "eltwise_forward", *arguments), (lib.SRC, lib.DST))


@cached
def _activation_backward(size: int, dtype: int, kind: str) -> Primitive:
    """Return dx = (y > 0) dy, or the slope below zero times dy; takes the addresses of y, zero, dx and dy.

    The output has the sign of the input, so that the input need not be kept. The comparison gives 1 or 0, for leaky
    ReLU brought to 1 or its slope; the library's own gradient of ReLU takes up to three times as long.
    """
    flat, below = vector(size, dtype), slope(kind)
    then: list[PostOp] = [("eltwise", lib.LINEAR, 1.0 - below, below)] if below else []
    then.append(("binary", lib.BINARY_MUL, (size,), (1,), dtype))
    arguments = (lib.BINARY_GREATER, flat, vector(1), flat, attributes(tuple(then)))
    return Primitive(
        Description(f"{kind} gradient of {size}", "binary", *arguments),
        (lib.SRC, lib.SRC_1, lib.DST, lib.post_op_source(len(then) - 1)),
    )


@cached
def _add(size: int, dtype: int, activation: str | None) -> Primitive:
    """Return y = f(a + b)."""
    flat = vector(size, dtype)
    description = Description(
        f"sum of {size}", "binary", lib.BINARY_ADD, flat, flat, flat, attributes(relu(activation))
    )
    return Primitive(description, (lib.SRC, lib.SRC_1, lib.DST))
