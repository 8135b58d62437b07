"""Fully connected layers by oneDNN: the weight is read and its gradient written as they lie, (out, in).

A weight is hundreds of megabytes where a batch is one, so these are bound by memory and nothing may copy it.
Legend: M samples, I input features, O output features.
"""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import empty
from hpcnn.ops import cpu
from hpcnn.ops.onednn import library as lib
from hpcnn.ops.onednn.primitive import (
    Description,
    Primitive,
    address,
    attributes,
    cached,
    matrix,
    plain,
    relu,
    vector,
)


def linear_forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, activation: str | None = None
) -> np.ndarray:
    """See `hpcnn.ops.linear_forward`."""
    samples, (outputs, inputs) = x.shape[0], weight.shape
    primitive = _forward(samples, inputs, outputs, bias is not None, activation)
    if primitive is None:
        return cpu.linear_forward(x, weight, bias, activation=activation)
    x, weight, y = plain(x), plain(weight), empty((samples, outputs))
    if bias is None:
        primitive(address(x), address(weight), address(y))
    else:
        bias = plain(bias)
        primitive(address(x), address(weight), address(y), address(bias))
    return y


def linear_backward_input(grad_output: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """See `hpcnn.ops.linear_backward_input`."""
    samples, (outputs, inputs) = grad_output.shape[0], weight.shape
    primitive = _backward_input(samples, inputs, outputs)
    if primitive is None:
        return cpu.linear_backward_input(grad_output, weight)
    grad_output, weight, grad_input = plain(grad_output), plain(weight), empty((samples, inputs))
    primitive(address(grad_output), address(weight), address(grad_input))
    return grad_input


def linear_backward_weight(
    x: np.ndarray,
    grad_output: np.ndarray,
    *,
    bias: bool = True,
    out: tuple[np.ndarray, np.ndarray | None] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """See `hpcnn.ops.linear_backward_weight`."""
    (samples, inputs), outputs = x.shape, grad_output.shape[1]
    primitive = backward_weight(samples, inputs, outputs, bias)
    if primitive is None:
        return cpu.linear_backward_weight(x, grad_output, bias=bias, out=out)
    grad_weight, grad_bias = out if out is not None else (empty((outputs, inputs)), empty(outputs) if bias else None)
    x, grad_output = plain(x), plain(grad_output)
    addresses = [address(x), address(grad_weight), address(grad_output)]
    if bias and grad_bias is not None:
        addresses.append(address(grad_bias))
    primitive(*addresses)
    return grad_weight, grad_bias


@cached
def _forward(samples: int, inputs: int, outputs: int, bias: bool, activation: str | None) -> Primitive:
    """Return y = x W^T + b; oneDNN's own choice (brgemm) reads the transposed weight fastest."""
    who = f"linear of ({samples}, {inputs}) to {outputs}"
    biases = matrix(1, outputs) if bias else None
    layouts = matrix(samples, inputs), matrix(inputs, outputs, transposed=True), biases, matrix(samples, outputs)
    description = Description(who, "matmul", *layouts, attributes(relu(activation)))
    return Primitive(description, [lib.SRC, lib.WEIGHTS, lib.DST, *([lib.BIAS] if bias else [])])


@cached
def _backward_input(samples: int, inputs: int, outputs: int) -> Primitive:
    """Return dx = dy W; the GEMM is as fast as brgemm on few samples and faster on many."""
    who = f"linear input gradient of ({samples}, {outputs}) to {inputs}"
    layouts = matrix(samples, outputs), matrix(outputs, inputs), None, matrix(samples, inputs)
    return Primitive(Description(who, "matmul", *layouts, attributes(), prefer="gemm"), (lib.SRC, lib.WEIGHTS, lib.DST))


@cached
def backward_weight(samples: int, inputs: int, outputs: int, bias: bool) -> Primitive:
    """Return dW = dy^T x and db; takes the addresses of x, dW, dy, and db where `bias`.

    The GEMM behind the inner product splits the sum over samples between threads too, which BLAS does not: that is
    what serves 1x1 convolutions, whose "samples" are pixels.
    """
    who = f"linear weight gradient of ({samples}, {inputs}) to {outputs}"
    source, filters, target = matrix(samples, inputs), matrix(outputs, inputs), matrix(samples, outputs)
    hint = Description(
        who, "inner_product_forward", lib.FORWARD, source, filters, vector(outputs), target, attributes()
    )
    biases = vector(outputs) if bias else None
    description = Description(
        who, "inner_product_backward_weights", source, filters, biases, target, hint.handle, attributes(), prefer="gemm"
    )
    arguments = [lib.SRC, lib.DIFF_WEIGHTS, lib.DIFF_DST, *([lib.DIFF_BIAS] if bias else [])]
    return Primitive(description, arguments)
