"""Batch normalisation on the device: sums in float64 in a fixed order, and one pass that applies them.

What the public functions call the mask is, here, the forward pass's coefficients of each channel: backward finds the
sign of what went into the activation from them and its input, which it reads anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Pair
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.launch import BLOCKS_PER_PROCESSOR, THREADS, empty_like, rows_grid, variant, vector_width
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
    channels = x.shape[-1]
    if statistics is None:
        mean, var, coefficients = _statistics(x, gamma, beta, epsilon)
    else:
        mean, var = statistics
        coefficients = device().empty((3, channels), np.float32)
        numbers = np.int32(channels), np.float64(epsilon)
        _launch_channels("forward_coefficients", channels, mean, var, gamma, beta, coefficients, *numbers)
    y = empty_like(x)
    width, positions = vector_width(channels, x, y), x.size // channels
    grid, block = rows_grid(
        positions, channels // width, rows_per_thread=_ROWS_PER_THREAD, per_processor=BLOCKS_PER_PROCESSOR
    )
    extents = np.int64(positions), np.int32(channels), ACTIVATIONS[activation]
    _launch(f"batchnorm_forward_{variant(width)}_{suffix(x.dtype)}", grid, block, x, y, coefficients, *extents)
    return y, mean, var, None if activation is None else coefficients


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
    channels = x.shape[-1]
    positions = x.size // channels
    extents = np.int64(positions), np.int32(channels), ACTIVATIONS[activation]
    numbers = np.float64(epsilon), np.float64(positions if count is None else count)
    grad_gamma, grad_beta = out if out is not None else (empty_like(gamma), empty_like(gamma))
    sums, coefficients = device().empty((2, channels), np.float64), device().empty((4, channels), np.float32)

    width = vector_width(channels, x, grad_output)
    grid, block = _sum_grid(positions, channels // width)
    partial = device().empty((2, grid[1], channels), np.float64)
    name = f"batchnorm_errors_{variant(width)}_{suffix(x.dtype)}"
    _launch(name, grid, block, grad_output, x, mask, partial, *extents)
    # Alone, the same kernel goes on to the coefficients.
    alone = coefficients if reduce_sum is None else None
    final = partial, mean, var, sums, grad_gamma, grad_beta, np.int32(grid[1]), np.int32(channels), alone, gamma
    kind = _statistics_suffix(mean)
    _launch(f"batchnorm_sums_{kind}", (-(-channels // _FINAL_BLOCK[0]), 1), _FINAL_BLOCK, *final, *numbers)
    if reduce_sum is not None:
        reduce_sum(sums)
        arguments = sums, mean, var, gamma, coefficients, np.int32(channels), *numbers
        _launch_channels("backward_coefficients", channels, *arguments)

    grad_input = empty_like(x)
    width = vector_width(channels, x, grad_output, grad_input)
    grid, block = rows_grid(
        positions, channels // width, rows_per_thread=_ROWS_PER_THREAD, per_processor=BLOCKS_PER_PROCESSOR
    )
    name = f"batchnorm_backward_{variant(width)}_{suffix(x.dtype)}"
    _launch(name, grid, block, grad_output, x, grad_input, mask, coefficients, *extents)
    return grad_input, grad_gamma, grad_beta


def _statistics(x: Array, gamma: Array | None, beta: Array | None, epsilon: float) -> tuple[Array, Array, Array | None]:
    """Return mean, variance, and, given gamma and beta, the coefficients of the forward pass."""
    channels = x.shape[-1]
    positions = x.size // channels
    width = vector_width(channels, x)
    grid, block = _sum_grid(positions, channels // width)
    partial = device().empty((2, grid[1], channels), np.float64)
    extents = np.int64(positions), np.int32(channels)
    _launch(f"batchnorm_powers_{variant(width)}_{suffix(x.dtype)}", grid, block, x, partial, *extents)
    mean, var = device().empty((channels,), np.float64), device().empty((channels,), np.float64)
    coefficients = None if gamma is None else device().empty((3, channels), np.float32)
    _launch(
        f"batchnorm_statistics_{suffix(x.dtype)}",
        (-(-channels // _FINAL_BLOCK[0]), 1),
        _FINAL_BLOCK,
        *(partial, x, mean, var, np.int32(grid[1]), np.int32(channels), np.int64(positions)),
        *(coefficients, gamma, beta, np.float64(epsilon)),
    )
    return mean, var, coefficients


def _sum_grid(positions: int, columns: int) -> tuple[Pair, Pair]:
    """Return grid and block of the kernels that sum over positions; the sums' order depends on it."""
    return rows_grid(positions, columns, rows_per_thread=_ROWS_PER_THREAD, per_processor=_SUM_BLOCKS_PER_PROCESSOR)


def _launch_channels(kernel: str, channels: int, *arguments: Any) -> None:
    """Launch a kernel with one thread for each channel; its second argument is one of the statistics."""
    name = f"batchnorm_{kernel}_{_statistics_suffix(arguments[1])}"
    _launch(name, (-(-channels // THREADS),), (THREADS,), *arguments)


def _launch(kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: Any) -> None:
    device().launch("batchnorm", kernel, grid, block, *arguments)


def _statistics_suffix(statistic: Array) -> str:
    """Return how kernels name the type of statistics: given ones may be float32, own ones are float64."""
    return "f64" if statistic.dtype == np.float64 else "f32"
