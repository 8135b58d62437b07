"""Batch normalisation on the device: sums in float64 in a fixed order, and one pass that applies them.

What the public functions call the mask is, here, the forward pass's coefficients of each channel: backward finds the
sign of what went into the activation from them and its input, which it reads anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Pair, Shape
from hpcnn.ops.cuda.device import GIVEN, Launch, device, remembered
from hpcnn.ops.cuda.launch import BLOCKS_PER_PROCESSOR, THREADS, VECTOR_BYTES, aligned, rows_grid, variant
from hpcnn.ops.cuda.types import ACTIVATIONS, suffix

_SUM_BLOCKS_PER_PROCESSOR = 4
_ROWS_PER_THREAD = 4
# Blocks that add up the sums of blocks: so many channels, and as many rows as fill the block.
_FINAL_BLOCK = (16, THREADS // 16)


def batchnorm_statistics(x: Array) -> tuple[Array, Array]:
    """See `hpcnn.ops.batchnorm_statistics`; float64.

    One pass over x - x[0] of each channel and its square, which float64 holds exactly.
    """
    return _statistics(x, None, None, 0.0)[:2]


def batchnorm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    *,
    epsilon: float,
    activation: str | None = None,
    statistics: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """See `hpcnn.ops.batchnorm_forward`; the mask is (3, C) coefficients."""
    if statistics is None:
        mean, var, coefficients = _statistics(x, gamma, beta, epsilon)
    else:
        mean, var = statistics
        coefficients = device().empty((3, x.shape[-1]), np.float32)
        _forward_coefficients(x.shape[-1], mean.dtype, epsilon)(mean, var, gamma, beta, coefficients)
    y = device().empty(x.shape, x.dtype)
    _apply_forward(x.shape, x.dtype, _width(x), activation)(x, y, coefficients)
    return y, mean, var, None if activation is None else coefficients


def batchnorm_track(
    mean: Array, var: Array, running_mean: Array, running_var: Array, *, momentum: float, count: int
) -> None:
    """See `hpcnn.ops.batchnorm_track`."""
    _track(mean.shape[0], mean.dtype, momentum, count)(mean, var, running_mean, running_var)


def batchnorm_backward(
    grad_output: Array,
    x: Array,
    gamma: Array,
    mean: Array,
    var: Array,
    mask: Array | None,
    *,
    epsilon: float,
    activation: str | None = None,
    count: int | None = None,
    reduce_sum: Callable[[Array], None] | None = None,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """See `hpcnn.ops.batchnorm_backward`; `reduce_sum` gets a float64 array (2, C) of this device."""
    shape, dtype, empty = x.shape, x.dtype, device().empty
    channels = shape[-1]
    width = min(_width(x), _width(grad_output))
    count = x.size // channels if count is None else count
    grad_gamma, grad_beta = out if out is not None else (empty(gamma.shape, np.float32), empty(gamma.shape, np.float32))
    coefficients = device().scratch(4 * channels, np.float32)
    sums = None if reduce_sum is None else empty((2, channels), np.float64)

    blocks, errors, apply = _backward(shape, dtype, width, activation)
    partial = device().scratch(2 * blocks * channels, np.float64)
    errors(grad_output, x, mask, partial)
    finish, spread = _backward_sums(channels, mean.dtype, blocks, epsilon, count)
    # Alone, the same kernel goes on to the coefficients.
    alone = coefficients if reduce_sum is None else None
    finish(partial, mean, var, sums, grad_gamma, grad_beta, alone, gamma)
    if reduce_sum is not None:
        reduce_sum(sums)
        spread(sums, mean, var, gamma, coefficients)

    grad_input = empty(shape, dtype)
    apply(grad_output, x, grad_input, mask, coefficients)
    return grad_input, grad_gamma, grad_beta


def _statistics(x: Array, gamma: Array | None, beta: Array | None, epsilon: float) -> tuple[Array, Array, Array | None]:
    """Return mean, variance, and, given gamma and beta, the coefficients of the forward pass."""
    channels, empty = x.shape[-1], device().empty
    blocks, powers, finish = _forward_sums(x.shape, x.dtype, _width(x), epsilon)
    partial = device().scratch(2 * blocks * channels, np.float64)
    powers(x, partial)
    mean, var = empty((channels,), np.float64), empty((channels,), np.float64)
    coefficients = None if gamma is None else empty((3, channels), np.float32)
    finish(partial, x, mean, var, coefficients, gamma, beta)
    return mean, var, coefficients


def _width(x: Array) -> int:
    """Return how many channels of `x` a thread moves at once."""
    width = VECTOR_BYTES // x.dtype.itemsize
    return width if x.shape[-1] % width == 0 and aligned(width, x) else 1


@remembered
def _forward_sums(shape: Shape, dtype: Any, width: int, epsilon: float) -> tuple[int, Launch, Launch]:
    """Return the blocks that sum over positions, and the two kernels of `_statistics`."""
    positions, channels = prod(shape[:-1]), shape[-1]
    grid, block = _sum_grid(positions, channels // width)
    extents = np.int64(positions), np.int32(channels)
    powers = _prepare(f"powers_{variant(width)}_{suffix(dtype)}", grid, block, GIVEN, GIVEN, *extents)
    final = np.int32(grid[1]), np.int32(channels), np.int64(positions)
    finish = _prepare(
        f"statistics_{suffix(dtype)}",
        (-(-channels // _FINAL_BLOCK[0]), 1),
        _FINAL_BLOCK,
        *(GIVEN, GIVEN, GIVEN, GIVEN, *final, GIVEN, GIVEN, GIVEN, np.float64(epsilon)),
    )
    return grid[1], powers, finish


@remembered
def _apply_forward(shape: Shape, dtype: Any, width: int, activation: str | None) -> Launch:
    """Return the kernel that applies the coefficients of the forward pass."""
    numbers = np.int64(prod(shape[:-1])), np.int32(shape[-1]), ACTIVATIONS[activation]
    grid, block = _apply_grid(shape, width)
    return _prepare(f"forward_{variant(width)}_{suffix(dtype)}", grid, block, GIVEN, GIVEN, GIVEN, *numbers)


@remembered
def _backward(shape: Shape, dtype: Any, width: int, activation: str | None) -> tuple[int, Launch, Launch]:
    """Return the blocks that sum over positions, their kernel, and the one that applies the coefficients."""
    positions, channels = prod(shape[:-1]), shape[-1]
    numbers = np.int64(positions), np.int32(channels), ACTIVATIONS[activation]
    name = f"{variant(width)}_{suffix(dtype)}"
    grid, block = _sum_grid(positions, channels // width)
    errors = _prepare(f"errors_{name}", grid, block, GIVEN, GIVEN, GIVEN, GIVEN, *numbers)
    given = (GIVEN,) * 5
    return grid[1], errors, _prepare(f"backward_{name}", *_apply_grid(shape, width), *given, *numbers)


@remembered
def _backward_sums(channels: int, statistics: Any, blocks: int, epsilon: float, count: float) -> tuple[Launch, Launch]:
    """Return the kernel that ends the sums of the backward pass, and the one that makes coefficients of such."""
    numbers = np.float64(epsilon), np.float64(count)
    finish = _prepare(
        f"sums_{_statistics_suffix(statistics)}",
        (-(-channels // _FINAL_BLOCK[0]), 1),
        _FINAL_BLOCK,
        *(*(GIVEN,) * 6, np.int32(blocks), np.int32(channels), GIVEN, GIVEN, *numbers),
    )
    given = (GIVEN,) * 5
    return finish, _by_channel("backward_coefficients", channels, statistics, *given, np.int32(channels), *numbers)


@remembered
def _forward_coefficients(channels: int, statistics: Any, epsilon: float) -> Launch:
    """Return the kernel that makes coefficients of the forward pass of given statistics."""
    given = (GIVEN,) * 5
    return _by_channel("forward_coefficients", channels, statistics, *given, np.int32(channels), np.float64(epsilon))


@remembered
def _track(channels: int, statistics: Any, momentum: float, count: int) -> Launch:
    """Return the kernel of `batchnorm_track`."""
    numbers = np.int32(channels), np.float64(momentum), np.float64(count / max(count - 1, 1))
    return _by_channel("track", channels, statistics, *(GIVEN,) * 4, *numbers)


def _sum_grid(positions: int, columns: int) -> tuple[Pair, Pair]:
    """Return grid and block of the kernels that sum over positions; the sums' order depends on it."""
    return rows_grid(positions, columns, rows_per_thread=_ROWS_PER_THREAD, per_processor=_SUM_BLOCKS_PER_PROCESSOR)


def _apply_grid(shape: Shape, width: int) -> tuple[Pair, Pair]:
    """Return grid and block of the kernels that visit every element once."""
    positions, columns = prod(shape[:-1]), shape[-1] // width
    return rows_grid(positions, columns, rows_per_thread=_ROWS_PER_THREAD, per_processor=BLOCKS_PER_PROCESSOR)


def _by_channel(kernel: str, channels: int, statistics: Any, *arguments: Any) -> Launch:
    """Return a kernel with one thread for each channel; `statistics` is the type of mean and variance."""
    blocks = -(-channels // THREADS)
    return _prepare(f"{kernel}_{_statistics_suffix(statistics)}", (blocks,), (THREADS,), *arguments)


def _prepare(kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: Any) -> Launch:
    return device().prepare("batchnorm", f"batchnorm_{kernel}", grid, block, *arguments)


def _statistics_suffix(dtype: Any) -> str:
    """Return how kernels name the type of statistics: given ones may be float32, own ones are float64."""
    return "f64" if dtype == np.float64 else "f32"
