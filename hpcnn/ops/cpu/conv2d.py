"""2-D convolution in NumPy: columns of pixels (im2col), then one GEMM a block of samples or rows.

Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows
and columns, G groups; M = positions (samples, P, Q) of a block, D = R * S * C / G numbers that one output reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import numpy as np

from hpcnn.arrays import Padding, Pair, empty
from hpcnn.geometry import NO_PADDING, output_size
from hpcnn.ops.cpu.activation import activate
from hpcnn.ops.cpu.linear import bias_gradient
from hpcnn.ops.cpu.windows import pad, windows

COLUMN_BYTES = 4 << 20
"""Upper bound of the column buffer (but at least one row of outputs): enough for GEMM, little enough for the cache."""


class _Part(NamedTuple):
    """Columns of some samples and output rows."""

    samples: slice
    rows: slice
    columns: np.ndarray  # (G, M, D)


def conv2d_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str | None = None,
) -> np.ndarray:
    """See `hpcnn.ops.conv2d_forward`."""
    filters, kernel_size = weight.shape[0], weight.shape[1:3]
    size = output_size(x.shape[1:3], kernel_size, stride, padding, dilation)
    y = empty((x.shape[0], *size, filters), x.dtype)
    matrix = weight.reshape(groups, filters // groups, -1).transpose(0, 2, 1)
    for part in _parts(x, kernel_size, stride, padding, dilation, groups):
        target = y[part.samples, part.rows]
        np.matmul(part.columns, matrix, out=_by_group(target, groups))
        if bias is not None:
            target += bias
        if activation is not None:
            activate(target, activation, target)
    return y


def conv2d_backward_weight(
    x: np.ndarray,
    grad_output: np.ndarray,
    kernel_size: Pair,
    *,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    bias: bool = True,
    out: tuple[np.ndarray, np.ndarray | None] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """See `hpcnn.ops.conv2d_backward_weight`."""
    filters = grad_output.shape[3]
    shape = (filters, *kernel_size, x.shape[3] // groups)
    grad_weight, grad_bias = out if out is not None else (empty(shape, x.dtype), None)
    total = grad_weight.reshape(groups, filters // groups, -1)
    target = total  # of the first part's product; later ones are added
    for part in _parts(x, kernel_size, stride, padding, dilation, groups):
        grad = _by_group(grad_output[part.samples, part.rows], groups).transpose(0, 2, 1)
        np.matmul(grad, part.columns, out=target)
        if target is total:
            target = empty(total.shape, x.dtype)
        else:
            total += target
    return grad_weight, bias_gradient(grad_output.reshape(-1, filters), grad_bias) if bias else None


def conv2d_backward_input(
    grad_output: np.ndarray,
    weight: np.ndarray,
    input_size: Pair,
    *,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> np.ndarray:
    """See `hpcnn.ops.conv2d_backward_input`."""
    # Turning large filters round costs more than it saves where there is little to convolve.
    if stride == (1, 1) and grad_output.size >= weight.size:
        return _convolve_back(grad_output, weight, padding, dilation, groups)
    return _scatter_back(grad_output, weight, input_size, stride, padding, dilation, groups)


def _convolve_back(
    grad_output: np.ndarray, weight: np.ndarray, padding: Padding, dilation: Pair, groups: int
) -> np.ndarray:
    """Return the input gradient of a convolution of stride 1: a convolution with the filters turned round."""
    filters, *kernel_size, depth = weight.shape
    turned = weight.reshape(groups, filters // groups, *kernel_size, depth)[:, :, ::-1, ::-1]
    turned = turned.transpose(0, 4, 2, 3, 1).reshape(groups * depth, *kernel_size, filters // groups)
    # How far the window reaches past the padding. Where padding is the wider, its outer outputs saw no pixel at all.
    (top, bottom), (left, right) = (
        ((kernel - 1) * spread - before, (kernel - 1) * spread - after)
        for kernel, spread, (before, after) in zip(kernel_size, dilation, padding, strict=True)
    )
    rows, columns = grad_output.shape[1:3]
    seen = grad_output[:, max(0, -top) : rows - max(0, -bottom), max(0, -left) : columns - max(0, -right)]
    return conv2d_forward(
        np.ascontiguousarray(seen),
        turned,
        stride=(1, 1),
        padding=((max(0, top), max(0, bottom)), (max(0, left), max(0, right))),
        dilation=dilation,
        groups=groups,
    )


def _scatter_back(
    grad_output: np.ndarray,
    weight: np.ndarray,
    input_size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> np.ndarray:
    """Return the input gradient of any convolution: gradients of the columns, each added where it was read."""
    (count, *size, filters), kernel_size, depth = grad_output.shape, weight.shape[1:3], weight.shape[3]
    matrix = weight.reshape(groups, filters // groups, -1)
    (top, bottom), (left, right) = padding
    padded_size = input_size[0] + top + bottom, input_size[1] + left + right
    grad_input = empty((count, *input_size, groups * depth), grad_output.dtype)
    step = max(1, COLUMN_BYTES // (prod(size) * matrix[:, 0].nbytes))
    for start in range(0, count, step):
        grad = grad_output[start : start + step]
        columns = empty((groups, len(grad) * prod(size), matrix.shape[2]), grad.dtype)
        np.matmul(_by_group(grad, groups), matrix, out=columns)
        taps = columns.reshape(groups, len(grad), *size, *kernel_size, depth).transpose(1, 2, 3, 4, 5, 0, 6)
        padded = empty((len(grad), *padded_size, groups, depth), grad.dtype)
        padded.fill(0)
        for r, s in np.ndindex(*kernel_size):
            rows = slice(r * dilation[0], r * dilation[0] + (size[0] - 1) * stride[0] + 1, stride[0])
            across = slice(s * dilation[1], s * dilation[1] + (size[1] - 1) * stride[1] + 1, stride[1])
            padded[:, rows, across] += taps[:, :, :, r, s]
        inner = padded[:, top : top + input_size[0], left : left + input_size[1]]
        grad_input[start : start + step] = inner.reshape(len(grad), *input_size, -1)
    return grad_input


def _parts(
    x: np.ndarray, kernel_size: Pair, stride: Pair, padding: Padding, dilation: Pair, groups: int
) -> Iterator[_Part]:
    """Yield the columns of `x` part by part; their buffer is reused, so that a part dies with the next."""
    if kernel_size == (1, 1) and stride == (1, 1) and padding == NO_PADDING:
        yield _Part(slice(None), slice(None), _by_group(x, groups))
        return
    rows, across = output_size(x.shape[1:3], kernel_size, stride, padding, dilation)
    channels = x.shape[3]
    depth = prod(kernel_size) * channels
    row_bytes = across * depth * x.itemsize
    step = min(len(x), max(1, COLUMN_BYTES // (rows * row_bytes)))
    row_step = rows if step > 1 else min(rows, max(1, COLUMN_BYTES // row_bytes))
    buffer = empty(step * row_step * across * depth, x.dtype)
    for start in range(0, len(x), step):
        samples = slice(start, min(start + step, len(x)))
        view = windows(pad(x[samples], padding), kernel_size, stride, dilation)
        grouped = view.reshape(*view.shape[:5], groups, channels // groups).transpose(5, 0, 1, 2, 3, 4, 6)
        for first in range(0, rows, row_step):
            source = grouped[:, :, first : first + row_step]
            columns = buffer[: source.size].reshape(source.shape)
            np.copyto(columns, source)
            taken = slice(first, first + source.shape[2])
            yield _Part(samples, taken, columns.reshape(groups, -1, depth // groups))


def _by_group(x: np.ndarray, groups: int) -> np.ndarray:
    """Return a view (G, M, channels / G) of an array (..., channels) whose leading axes can be merged."""
    return x.reshape(-1, groups, x.shape[-1] // groups).transpose(1, 0, 2)
