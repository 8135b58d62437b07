"""Pooling on the device: a thread for each output, or input in backward passes, and 16 bytes of channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Padding, Pair, Shape
from hpcnn.errors import ShapeError
from hpcnn.geometry import output_size
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.launch import (
    BLOCKS_PER_PROCESSOR,
    LARGEST_GRID_Y,
    LARGEST_INT,
    THREADS,
    empty_like,
    rows_block,
    variant,
    vector_width,
)
from hpcnn.ops.cuda.types import suffix

POOL2D = np.dtype(
    [
        (name, np.int32)
        for name in ("n", "h", "w", "c", "p", "q", "r", "s", "stride_h", "stride_w", "pad_top", "pad_left")
    ]
)
"""`struct Pool2d` of `kernels/pool2d.cu`."""

LARGEST_BYTE_WINDOW = 255
"""Windows of at most so many places have their argmax in bytes."""


def maxpool2d_forward(x: Array, window: Pair, *, stride: Pair, padding: Padding) -> tuple[Array, Array]:
    """See `hpcnn.ops.maxpool2d_forward`."""
    size = output_size(x.shape[1:3], window, stride, padding)
    shape = (x.shape[0], *size, x.shape[3])
    y = empty_like(x, shape=shape)
    argmax = device().empty(shape, np.uint8 if prod(window) <= LARGEST_BYTE_WINDOW else np.int32)
    geometry = _geometry(x.shape, size, window, stride, padding)
    _launch_maximum("maxpool2d_forward", (x, y), argmax, shape, (x, y, argmax, geometry))
    return y, argmax


def maxpool2d_backward(
    grad_output: Array, argmax: Array, input_size: Pair, window: Pair, *, stride: Pair, padding: Padding
) -> Array:
    """See `hpcnn.ops.maxpool2d_backward`; each pixel gathers from the windows it lies in."""
    shape = (grad_output.shape[0], *input_size, grad_output.shape[3])
    grad_input = empty_like(grad_output, shape=shape)
    geometry = _geometry(shape, grad_output.shape[1:3], window, stride, padding)
    arguments = (grad_output, argmax, grad_input, geometry)
    _launch_maximum("maxpool2d_backward", (grad_output, grad_input), argmax, shape, arguments)
    return grad_input


def avgpool2d_forward(x: Array, window: Pair, *, stride: Pair, padding: Padding) -> Array:
    """See `hpcnn.ops.avgpool2d_forward`."""
    size = output_size(x.shape[1:3], window, stride, padding)
    y = empty_like(x, shape=(x.shape[0], *size, x.shape[3]))
    geometry = _geometry(x.shape, size, window, stride, padding)
    width = vector_width(x.shape[3], x, y)
    _launch("avgpool2d_forward", width, y.shape, (x, y, geometry, np.float32(1.0 / prod(window))))
    return y


def avgpool2d_backward(grad_output: Array, input_size: Pair, window: Pair, *, stride: Pair, padding: Padding) -> Array:
    """See `hpcnn.ops.avgpool2d_backward`; each pixel gathers from the windows it lies in."""
    shape = (grad_output.shape[0], *input_size, grad_output.shape[3])
    grad_input = empty_like(grad_output, shape=shape)
    geometry = _geometry(shape, grad_output.shape[1:3], window, stride, padding)
    width = vector_width(shape[3], grad_output, grad_input)
    share = np.float32(1.0 / prod(window))
    _launch("avgpool2d_backward", width, shape, (grad_output, grad_input, geometry, share))
    return grad_input


def global_avgpool_forward(x: Array) -> Array:
    """See `hpcnn.ops.global_avgpool_forward`; summed in float64."""
    samples, rows, columns, channels = x.shape
    y = empty_like(x, shape=(samples, channels))
    width = vector_width(channels, x, y)
    block = rows_block(channels // width)
    grid = (-(-channels // width // block[0]), min(samples, LARGEST_GRID_Y))
    name = f"global_avgpool_forward_{variant(width)}_{suffix(x.dtype)}"
    arguments = (x, y, np.int32(samples), np.int64(rows * columns), np.int32(channels))
    device().launch("pool2d", name, grid, block, *arguments)
    return y


def global_avgpool_backward(grad_output: Array, input_size: Pair) -> Array:
    """See `hpcnn.ops.global_avgpool_backward`."""
    shape = (grad_output.shape[0], *input_size, grad_output.shape[1])
    grad_input = empty_like(grad_output, shape=shape)
    width = vector_width(shape[3], grad_output, grad_input)
    share = np.float32(1.0 / prod(input_size))
    _launch("global_avgpool_backward", width, shape, (grad_output, grad_input, *map(np.int32, shape), share))
    return grad_input


@lru_cache(1024)
def _geometry(shape: Shape, size: Pair | Shape, window: Pair, stride: Pair, padding: Padding) -> np.ndarray:
    """Return a `struct Pool2d` for images of `shape` (N, H, W, C) and outputs of `size` (P, Q)."""
    return np.array((*shape, *size, *window, *stride, padding[0][0], padding[1][0]), POOL2D)


def _launch_maximum(
    kernel: str, arrays: tuple[Array, Array], argmax: Array, shape: Shape, arguments: Sequence[Any]
) -> None:
    """Launch a kernel of maximum pooling; windows too large for bytes have one of their own."""
    if argmax.dtype == np.uint8:
        _launch(kernel, vector_width(shape[3], *arrays, argmax), shape, arguments)
    else:
        _launch(kernel, 1, shape, arguments, "wide")


def _launch(kernel: str, width: int, shape: Shape, arguments: Sequence[Any], which: str | None = None) -> None:
    """Launch a kernel with a thread for each pixel of `shape` (N, H, W, C) and each `width` channels."""
    samples, rows, columns, channels = shape
    across, lines = columns * (channels // width), samples * rows
    if max(columns * channels, lines) > LARGEST_INT:
        raise ShapeError(
            f"pool2d: images of {shape} have too many rows, or rows too long, for a GPU. Use smaller batches."
        )
    threads = min(THREADS, 1 << (across - 1).bit_length())
    block = (threads, THREADS // threads)
    wide = -(-across // threads)
    most = max(1, min(4 * device().num_processors * BLOCKS_PER_PROCESSOR // wide, LARGEST_GRID_Y))
    grid = (wide, min(-(-lines // block[1]), most))
    name = f"{kernel}_{which or variant(width)}_{suffix(arguments[0].dtype)}"
    device().launch("pool2d", name, grid, block, *arguments)
