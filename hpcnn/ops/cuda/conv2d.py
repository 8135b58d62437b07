"""2-D convolution on GPUs: each pass is one matrix product (see `hpcnn.ops.cuda.products`).

Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows
and columns.
"""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import Array, Padding, Pair, Shape
from hpcnn.geometry import output_size
from hpcnn.ops.cuda import products
from hpcnn.ops.cuda.columns import column_sums
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.products import Geometry, Kind, Problem


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
    size = output_size(x.shape[1:3], weight.shape[1:3], stride, padding, dilation)
    y = device().empty((x.shape[0], *size, weight.shape[0]), x.dtype)
    problem = _problem("forward", x, x.shape, weight.shape[:3], size, stride, padding, dilation, groups)
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
    shape = grad_input.shape
    problem = _problem("input", grad_output, shape, weight.shape[:3], size, stride, padding, dilation, groups)
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
    size = grad_output.shape[1:3]
    problem = _problem("weight", x, x.shape, shape[:3], size, stride, padding, dilation, groups)
    products.run(problem, x, grad_output, grad_weight)
    return grad_weight, column_sums(grad_output.reshape(-1, filters), grad_bias) if bias else None


def _problem(
    kind: Kind,
    of: Array,
    x_shape: Shape,
    filter_shape: Shape,
    size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> Problem:
    """Return a pass of the convolution of x (N, H, W, C) with filters (K, R, S); `of` has its element type."""
    offsets = padding[0][0], padding[1][0]
    geometry = Geometry._make((*x_shape, *filter_shape, *size, *stride, *offsets, *dilation, groups))
    return Problem(kind, products.compute_of(of), geometry)
