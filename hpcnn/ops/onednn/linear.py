"""Fully connected layers by oneDNN: the weight is read and its gradient written as they lie, in either order.

A weight is hundreds of megabytes where a batch is one, so these are bound by memory and nothing may copy it. Which of
the library's operations reads or writes a weight fastest depends on its order in memory. `transposed` tells it: False
for a C-ordered (O, I), True where a C-ordered (I, O) lies in memory.
Legend: M samples, I input features, O output features.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcnn.arrays import empty
from hpcnn.ops import cpu
from hpcnn.ops.onednn import library as lib
from hpcnn.ops.onednn.primitive import (
    Description,
    Handle,
    Primitive,
    address,
    attributes,
    cached,
    descriptor,
    matrix,
    plain,
    relu,
    vector,
)

# Where the product of the transposes pays (see `_pays`): numbers of samples, and the smallest weight.
FEWEST_SAMPLES, MOST_SAMPLES = 8, 128
SMALLEST_WEIGHT = 1 << 20
# Rows of dx^T that are transposed together, so that what is read and written stays in the cache.
STRIP_ROWS = 256
# From here on a product in bfloat16 wins back what rounding its weight costs.
MANY_SAMPLES = 256


def pays_rounded(x: np.ndarray, *_: Any, **__: Any) -> bool:
    """Return whether bfloat16 is faster than float32 on widened images.

    To round a weight takes as long as to multiply a hundred images by it, and it is float32 where it lies.
    """
    return lib.computes_bfloat16() and len(x) >= MANY_SAMPLES


def linear_forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, activation: str | None = None
) -> np.ndarray:
    """See `hpcnn.ops.linear_forward`."""
    weight, transposed = _as_it_lies(weight)
    samples, (outputs, inputs) = x.shape[0], weight.shape
    create = _forward if x.dtype == np.float32 else _rounded_forward
    primitive = create(samples, inputs, outputs, bias is not None, activation, transposed)
    if primitive is None:
        return cpu.linear_forward(x, weight, bias, activation=activation)
    x, y = plain(x), empty((samples, outputs), x.dtype)
    if bias is None:
        primitive(address(x), address(weight), address(y))
    else:
        bias = plain(bias)
        primitive(address(x), address(weight), address(y), address(bias))
    return y


def linear_backward_input(grad_output: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """See `hpcnn.ops.linear_backward_input`."""
    weight, transposed = _as_it_lies(weight)
    samples, (outputs, inputs) = grad_output.shape[0], weight.shape
    flipped = transposed and grad_output.dtype == np.float32 and _pays(samples, inputs * outputs)
    if flipped:
        primitive = _backward_input_flipped(samples, inputs, outputs)
    elif grad_output.dtype == np.float32:
        primitive = _backward_input(samples, inputs, outputs, transposed)
    else:
        primitive = _rounded_backward_input(samples, inputs, outputs, transposed)
    if primitive is None:
        return cpu.linear_backward_input(grad_output, weight)
    grad_output, grad_input = plain(grad_output), empty((samples, inputs), grad_output.dtype)
    if flipped:
        columns = empty((inputs, samples))
        primitive(address(weight), address(grad_output), address(columns))
        for start in range(0, inputs, STRIP_ROWS):
            strip = slice(start, start + STRIP_ROWS)
            grad_input[:, strip] = columns[strip].T
    else:
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
    grad_weight, grad_bias = out if out is not None else (empty((outputs, inputs)), empty(outputs) if bias else None)
    create = backward_weight if x.dtype == np.float32 else _rounded_backward_weight
    primitive = create(samples, inputs, outputs, bias, transposed=not grad_weight.flags.c_contiguous)
    if primitive is None:
        return cpu.linear_backward_weight(x, grad_output, bias=bias, out=out)
    x, grad_output = plain(x), plain(grad_output)
    addresses = [address(x), address(grad_weight), address(grad_output)]
    if bias and grad_bias is not None:
        addresses.append(address(grad_bias))
    primitive(*addresses)
    return grad_weight, grad_bias


def _as_it_lies(weight: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the weight, copied only if it has gaps, and whether its transpose is what is C-ordered."""
    transposed = weight.flags.f_contiguous and not weight.flags.c_contiguous
    return (weight if transposed else plain(weight)), transposed


def _pays(samples: int, weights: int) -> bool:
    """Return whether dx^T = W^T dy^T is faster than dx = dy W for a transposed weight.

    As the left factor the weight is read straight from memory; as the right one it is first packed into buffers, which
    costs more than the product where there are few samples. With many, or with a weight that stays in the cache, what
    is won is lost on transposing dx.
    """
    return FEWEST_SAMPLES <= samples <= MOST_SAMPLES and weights >= SMALLEST_WEIGHT


@cached
def _forward(
    samples: int, inputs: int, outputs: int, bias: bool, activation: str | None, transposed: bool
) -> Primitive:
    """Return y = x W^T + b.

    The inner product's GEMM reads a transposed weight fastest, and one in its own order several times slower than
    oneDNN's choice for a product of matrices (brgemm) does.
    """
    who = f"linear of ({samples}, {inputs}) to {outputs}"
    arguments = [lib.SRC, lib.WEIGHTS, lib.DST, *([lib.BIAS] if bias else [])]
    source, target, after = matrix(samples, inputs), matrix(samples, outputs), attributes(relu(activation))
    if transposed:
        biases = vector(outputs) if bias else None
        layouts = source, _weight(inputs, outputs, transposed), biases, target
        description = Description(who, "inner_product_forward", lib.FORWARD, *layouts, after, prefer="gemm")
    else:
        factor = matrix(inputs, outputs, transposed=True)
        description = Description(who, "matmul", source, factor, matrix(1, outputs) if bias else None, target, after)
    return Primitive(description, arguments)


@cached
def _backward_input(samples: int, inputs: int, outputs: int, transposed: bool) -> Primitive:
    """Return dx = dy W; for W in its own order the GEMM is as fast as brgemm on few samples and faster on many."""
    who = f"linear input gradient of ({samples}, {outputs}) to {inputs}"
    layouts = matrix(samples, outputs), _weight(inputs, outputs, transposed), None, matrix(samples, inputs)
    description = Description(who, "matmul", *layouts, attributes(), prefer="" if transposed else "gemm")
    return Primitive(description, (lib.SRC, lib.WEIGHTS, lib.DST))


@cached
def _backward_input_flipped(samples: int, inputs: int, outputs: int) -> Primitive:
    """Return dx^T = W^T dy^T for a transposed W; takes the addresses of W, dy and dx^T (I, M)."""
    who = f"transposed linear input gradient of ({samples}, {outputs}) to {inputs}"
    layouts = matrix(inputs, outputs), matrix(outputs, samples, transposed=True), None, matrix(inputs, samples)
    return Primitive(Description(who, "matmul", *layouts, attributes()), (lib.SRC, lib.WEIGHTS, lib.DST))


@cached
def backward_weight(samples: int, inputs: int, outputs: int, bias: bool, *, transposed: bool = False) -> Primitive:
    """Return dW = dy^T x and db; takes the addresses of x, dW, dy, and db where `bias`.

    The GEMM behind the inner product splits the sum over samples between threads too, which BLAS does not: that is
    what serves 1x1 convolutions, whose "samples" are pixels.
    """
    who = f"linear weight gradient of ({samples}, {inputs}) to {outputs}"
    source, filters, target = matrix(samples, inputs), _weight(inputs, outputs, transposed), matrix(samples, outputs)
    hint = Description(
        who, "inner_product_forward", lib.FORWARD, source, filters, vector(outputs), target, attributes()
    )
    biases = vector(outputs) if bias else None
    description = Description(
        who, "inner_product_backward_weights", source, filters, biases, target, hint.handle, attributes(), prefer="gemm"
    )
    arguments = [lib.SRC, lib.DIFF_WEIGHTS, lib.DIFF_DST, *([lib.DIFF_BIAS] if bias else [])]
    return Primitive(description, arguments)


@cached
def _rounded_forward(
    samples: int, inputs: int, outputs: int, bias: bool, activation: str | None, transposed: bool
) -> Primitive:
    """Return y = x W^T + b for x and y in bfloat16; W is rounded first."""
    description = _describe_rounded(samples, inputs, outputs, bias, activation)
    arguments = [lib.SRC, lib.WEIGHTS, lib.DST, *([lib.BIAS] if bias else [])]
    return Primitive(description, arguments, (lib.WEIGHTS, _weight(inputs, outputs, transposed)))


@cached
def _rounded_backward_input(samples: int, inputs: int, outputs: int, transposed: bool) -> Primitive:
    """Return dx = dy W for dx and dy in bfloat16; takes the addresses of dy, W and dx."""
    hint = _describe_rounded(samples, inputs, outputs, False, None)
    description = Description(
        f"bfloat16 linear input gradient of ({samples}, {outputs}) to {inputs}",
        "inner_product_backward_data",
        matrix(samples, inputs, lib.BF16),
        descriptor((outputs, inputs), data_type=lib.BF16),
        matrix(samples, outputs, lib.BF16),
        hint.handle,
        attributes(),
    )
    arguments = lib.DIFF_DST, lib.WEIGHTS, lib.DIFF_SRC
    return Primitive(description, arguments, (lib.WEIGHTS, _weight(inputs, outputs, transposed)))


@cached
def _rounded_backward_weight(
    samples: int, inputs: int, outputs: int, bias: bool, *, transposed: bool = False
) -> Primitive:
    """Return dW and db in float32 for x and dy in bfloat16; takes the addresses of x, dW, dy, and db where `bias`."""
    hint = _describe_rounded(samples, inputs, outputs, bias, None)
    description = Description(
        f"bfloat16 linear weight gradient of ({samples}, {inputs}) to {outputs}",
        "inner_product_backward_weights",
        matrix(samples, inputs, lib.BF16),
        descriptor((outputs, inputs)),
        vector(outputs) if bias else None,
        matrix(samples, outputs, lib.BF16),
        hint.handle,
        attributes(),
    )
    arguments = [lib.SRC, lib.DIFF_WEIGHTS, lib.DIFF_DST, *([lib.DIFF_BIAS] if bias else [])]
    return Primitive(description, arguments, (lib.DIFF_WEIGHTS, _weight(inputs, outputs, transposed)))


def _describe_rounded(samples: int, inputs: int, outputs: int, bias: bool, activation: str | None) -> Description:
    """Return the description of a forward pass in bfloat16, W in a format of the library's choice."""
    return Description(
        f"bfloat16 linear of ({samples}, {inputs}) to {outputs}",
        "inner_product_forward",
        lib.FORWARD,
        matrix(samples, inputs, lib.BF16),
        descriptor((outputs, inputs), data_type=lib.BF16),
        vector(outputs) if bias else None,
        matrix(samples, outputs, lib.BF16),
        attributes(relu(activation)),
    )


def _weight(inputs: int, outputs: int, transposed: bool) -> Handle:
    """Return the descriptor of a weight (O, I)."""
    return matrix(outputs, inputs, transposed=transposed)
