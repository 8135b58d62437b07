"""2-D convolution on GPUs: each pass is one matrix product (see `hpcnn.ops.cuda.products`).

Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows
and columns.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hpcnn.arrays import Array, Padding, Pair, Shape
from hpcnn.geometry import output_size
from hpcnn.ops.cuda import products
from hpcnn.ops.cuda.columns import column_sums
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.products import Problem


def conv2d_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str | None = None,
) -> Array:
    """See `hpcnn.ops.conv2d_forward`."""
    problem, shape = _forward(products.compute_of(x), x.shape, weight.shape, stride, padding, dilation, groups)
    y = device().empty(shape, x.dtype)
    products.run(problem, x, weight, bias, y, activation)
    return y


def conv2d_backward_input(
    grad_output: Array,
    weight: Array,
    input_size: Pair,
    *,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> Array:
    """See `hpcnn.ops.conv2d_backward_input`."""
    size = grad_output.shape[1:3]
    grad_input = device().empty((grad_output.shape[0], *input_size, weight.shape[3] * groups), grad_output.dtype)
    shape, filters, compute = grad_input.shape, weight.shape[:3], products.compute_of(grad_output)
    problem = products.convolution("input", compute, shape, filters, size, stride, padding, dilation, groups)
    products.run(problem, grad_output, weight, None, grad_input, None)
    return grad_input


def conv2d_backward_weight(
    x: Array,
    grad_output: Array,
    kernel_size: Pair,
    *,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    bias: bool = True,
    out: tuple[Array, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """See `hpcnn.ops.conv2d_backward_weight`; gradients are float32 whatever `x` is."""
    filters = grad_output.shape[3]
    shape = (filters, *kernel_size, x.shape[3] // groups)
    grad_weight, grad_bias = out if out is not None else (device().empty(shape, np.float32), None)
    size, compute = grad_output.shape[1:3], products.compute_of(x)
    problem = products.convolution("weight", compute, x.shape, shape[:3], size, stride, padding, dilation, groups)
    products.run(problem, x, grad_output, grad_weight)
    return grad_weight, column_sums(grad_output.reshape(-1, filters), grad_bias) if bias else None


@lru_cache(4096)
def _forward(
    compute: products.Compute,
    x_shape: Shape,
    weight_shape: Shape,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> tuple[Problem, Shape]:
    """Return the problem of a forward pass and the shape of its output."""
    filters = weight_shape[:3]
    size = output_size(x_shape[1:3], filters[1:], stride, padding, dilation)
    problem = products.convolution("forward", compute, x_shape, filters, size, stride, padding, dilation, groups)
    return problem, (x_shape[0], *size, filters[0])
