"""Fully connected layers on GPUs: convolutions of one pixel with filters of one pixel.

A weight (O, I) that is C-ordered is the filters (K=O, 1, 1, C=I) of a convolution of x. One that is Fortran-ordered,
as in the flat vector of parameters, is in memory (I, O): the filters (K=I, 1, 1, C=O) of a convolution that goes the
other way. Its input pass is then the layer's forward pass, and the reverse; neither weight is transposed.

Legend: N samples, I input features, O output features.
"""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import Array
from hpcnn.ops.cuda import products
from hpcnn.ops.cuda.columns import column_sums
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.products import Geometry, Kind, Problem


def linear_forward(x: Array, weight: Array, bias: Array | None = None, *, activation: str | None = None) -> Array:
    """See `hpcnn.ops.linear_forward`."""
    y = device().empty((x.shape[0], weight.shape[0]), x.dtype)
    _multiply(x, weight, bias, y, activation)
    return y


def linear_backward_input(grad_output: Array, weight: Array) -> Array:
    """See `hpcnn.ops.linear_backward_input`."""
    grad_input = device().empty((grad_output.shape[0], weight.shape[1]), grad_output.dtype)
    _multiply(grad_output, weight.T, None, grad_input, None)
    return grad_input


def linear_backward_weight(
    x: Array,
    grad_output: Array,
    *,
    bias: bool = True,
    out: tuple[Array, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """See `hpcnn.ops.linear_backward_weight`; gradients are float32 whatever `x` is."""
    shape = grad_output.shape[1], x.shape[1]
    grad_weight, grad_bias = out if out is not None else (device().empty(shape, np.float32), None)
    if grad_weight.flags.c_contiguous:
        stored, images, grads = grad_weight, x, grad_output
    else:
        stored, images, grads = grad_weight.T, grad_output, x
    products.run(_problem("weight", x, stored.shape), _pixels(images), _pixels(grads), _filters(stored))
    return grad_weight, column_sums(grad_output, grad_bias) if bias else None


def _multiply(x: Array, weight: Array, bias: Array | None, y: Array, activation: str | None) -> None:
    """Put x (N, I) times the transpose of a weight (O, I) of either order into y (N, O)."""
    kind: Kind = "forward" if weight.flags.c_contiguous else "input"
    stored = weight if kind == "forward" else weight.T
    products.run(_problem(kind, x, stored.shape), _pixels(x), _filters(stored), bias, _pixels(y), activation)


def _problem(kind: Kind, x: Array, stored: tuple[int, int]) -> Problem:
    """Return a pass of the convolution of N pixels of C channels with filters (K, 1, 1, C); `stored` is (K, C)."""
    filters, channels = stored
    geometry = Geometry(x.shape[0], 1, 1, channels, filters, *(1, 1), *(1, 1), *(1, 1), *(0, 0), *(1, 1), 1)
    return Problem(kind, products.compute_of(x), geometry)


def _pixels(x: Array) -> Array:
    """Return a matrix (N, C) as images of one pixel."""
    return x.reshape(x.shape[0], 1, 1, x.shape[1])


def _filters(weight: Array) -> Array:
    """Return a C-ordered matrix (K, C) as filters of one pixel."""
    return weight.reshape(weight.shape[0], 1, 1, weight.shape[1])
