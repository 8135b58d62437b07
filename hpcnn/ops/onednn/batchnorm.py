"""Batch normalisation by oneDNN, over all axes but the last.

Alone, backward is one fused pass. With others, the library is told that the statistics are constants: it then returns
gamma / s * g (s the deviation, g the masked gradient) and this array's sums of g and of g * (x - mean) / s. Once these
are summed over everyone, what the statistics' own gradients add is A x + B with A and B per channel: one more pass.
Legend: M positions (samples times pixels), C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpcnn.arrays import Shape, empty, empty_like
from hpcnn.ops import cpu
from hpcnn.ops.onednn import library as lib
from hpcnn.ops.onednn import pool2d
from hpcnn.ops.onednn.pointwise import activation_backward, activation_inplace
from hpcnn.ops.onednn.primitive import (
    Description,
    Handle,
    Primitive,
    address,
    attributes,
    cached,
    data_type,
    images,
    matrix,
    plain,
)

# From here on the library works through images in blocks of channels, several times slower than row by row.
ROWS_FROM_CHANNELS, ROWS_FROM_BYTES = 256, 1 << 23

# Images that fit, with their squares, into the caches of a few cores.
CACHED_BYTES = 1 << 21


def batchnorm_statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `hpcnn.ops.batchnorm_statistics`; float64.

    The library finds each sample's own mean and variance and float64 does the rest. So the result has the same bits
    (but for one in hundreds of millions, after rounding to float32) whoever holds the samples: a ReLU behind it, which
    cuts at zero, then cuts the same numbers on any number of ranks. It is also ten times as exact as one sum over the
    batch. Samples are taken as many at a time as stay in cache between the passes over them.
    """
    if x.ndim != 4:
        return cpu.batchnorm_statistics(x)
    x, (count, channels) = plain(x), (x.shape[0], x.shape[-1])
    means, variances = np.empty((2, count, channels), np.float32)
    step = max(1, min(count, CACHED_BYTES // (4 * x[0].size)))
    squares = empty((step, *x.shape[1:]))
    wide = None if x.dtype == np.float32 else empty(squares.shape)
    for start in range(0, count, step):
        part = x[start : start + step]
        if wide is not None:
            np.copyto(wide[: len(part)], part)
            part = wide[: len(part)]
        average, square = pool2d.mean_of_pixels(part.shape), _squared_distance(part.shape)
        if average is None or square is None:
            return cpu.batchnorm_statistics(x)
        average(address(part), address(means[start:]))
        square(address(part), address(means[start:]), address(squares))
        average(address(squares), address(variances[start:]))
    mean = means.mean(axis=0, dtype=np.float64)
    deviation = means - mean
    return mean, (variances + deviation * deviation).mean(axis=0)


def batchnorm_forward(
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    *,
    epsilon: float,
    activation: str | None = None,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """See `hpcnn.ops.batchnorm_forward`; the mask is the library's for ReLU, and the output for leaky ReLU."""
    fused = activation == "relu"
    statistics = batchnorm_statistics(x) if statistics is None else statistics
    primitive = _forward(x.shape, data_type(x), epsilon, fused, True)
    if primitive is None:
        return cpu.batchnorm_forward(x, gamma, beta, epsilon=epsilon, activation=activation, statistics=statistics)
    x, gamma, beta, y = plain(x), plain(gamma), plain(beta), empty_like(x)
    mean, var = statistics
    centre, spread = _float32(mean), _float32(var)
    addresses = [address(array) for array in (x, y, gamma, beta, centre, spread)]
    if not fused:
        primitive(*addresses)
        if activation is None:
            return y, mean, var, None
        activation_inplace(y, activation)
        return y, mean, var, y
    mask = empty(primitive.workspace_bytes, np.uint8)
    primitive(*addresses, address(mask))
    return y, mean, var, mask


def batchnorm_backward(
    grad_output: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    mask: np.ndarray | None,
    *,
    epsilon: float,
    activation: str | None = None,
    count: int | None = None,
    reduce_sum: Callable[[np.ndarray], None] | None = None,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See `hpcnn.ops.batchnorm_backward`."""
    fused = activation == "relu"
    primitive = _backward(x.shape, data_type(x), epsilon, fused, reduce_sum is not None)
    if primitive is None:
        options: dict[str, Any] = {
            "epsilon": epsilon,
            "activation": activation,
            "count": count,
            "reduce_sum": reduce_sum,
            "out": out,
        }
        return cpu.batchnorm_backward(grad_output, x, gamma, mean, var, mask, **options)
    error, x, gamma, mean, var = plain(grad_output), plain(x), plain(gamma), _float32(mean), _float32(var)
    if activation is not None and mask is not None and not fused:
        error = activation_backward(error, mask, activation)
    grad_input = empty_like(x)
    grad_gamma, grad_beta = out if out is not None else (empty(gamma.shape), empty(gamma.shape))
    arrays = [x, error, grad_input, gamma, mean, var, grad_gamma, grad_beta]
    if fused and mask is not None:
        arrays.append(mask)
    primitive(*[address(array) for array in arrays])
    if reduce_sum is not None:
        sums = np.array((grad_beta, grad_gamma), np.float64)
        reduce_sum(sums)
        _correct(grad_input, x, gamma, mean, var, sums / (count or x.size // x.shape[-1]), epsilon)
    return grad_input, grad_gamma, grad_beta


def _correct(
    grad_input: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    means: np.ndarray,
    epsilon: float,
) -> None:
    """Add what the statistics' gradients contribute, from the batch's `means` of g and of g * (x - mean) / s."""
    rstd = 1.0 / np.sqrt(var.astype(np.float64) + epsilon)
    factor = -gamma * rstd * rstd * means[1]
    offset = _float32(-gamma * rstd * means[0] - factor * mean)
    factor = _float32(factor)
    add_affine = _add_affine(x.size // x.shape[-1], x.shape[-1], data_type(x))
    if add_affine is None:
        grad_input[...] = grad_input + (x * factor + offset)
    else:
        target = address(grad_input)
        add_affine(address(x), address(factor), target, address(offset), target)


@cached
def _forward(shape: Shape, dtype: int, epsilon: float, fused: bool, given: bool) -> Primitive:
    """Return y from x, gamma and beta; mean and variance are read where `given`, else written; then the mask."""
    arguments = (lib.SRC, lib.DST, lib.SCALE, lib.SHIFT, lib.MEAN, lib.VARIANCE)
    return Primitive(
        _describe_forward(shape, dtype, epsilon, fused, given), (*arguments, *([lib.WORKSPACE] if fused else []))
    )


@cached
def _backward(shape: Shape, dtype: int, epsilon: float, fused: bool, given: bool) -> Primitive:
    """Return dx, dgamma and dbeta from x, dy, gamma, mean, variance and the mask."""
    hint = _describe_forward(shape, dtype, epsilon, fused, given)
    layout = _layout(shape, dtype)
    description = Description(
        f"batchnorm gradient of {shape}",
        "batch_normalization_backward",
        lib.BACKWARD,
        layout,
        layout,
        layout,
        epsilon,
        _flags(fused, given),
        hint.handle,
        attributes(),
    )
    arguments = [lib.SRC, lib.DIFF_DST, lib.DIFF_SRC, lib.SCALE, lib.MEAN, lib.VARIANCE, lib.DIFF_SCALE, lib.DIFF_SHIFT]
    return Primitive(description, [*arguments, *([lib.WORKSPACE] if fused else [])])


@cached
def _squared_distance(shape: Shape) -> Primitive:
    """Return (x - m)^2 for images x (N, H, W, C) and a number m for each sample and channel (N, C)."""
    pixels, points = images(shape), images((shape[0], 1, 1, shape[3]))
    then = attributes((("eltwise", lib.SQUARE, 0.0, 0.0),))
    who = f"squared distance of {shape} from the mean"
    return Primitive(
        Description(who, "binary", lib.BINARY_SUB, pixels, points, pixels, then), (lib.SRC, lib.SRC_1, lib.DST)
    )


@cached
def _add_affine(positions: int, channels: int, dtype: int) -> Primitive:
    """Return z = A x + B + z, with A and B per channel; takes the addresses of x, A, z, B and z."""
    layout, row = matrix(positions, channels, dtype), matrix(1, channels)
    then = (
        ("binary", lib.BINARY_ADD, (1, channels), (channels, 1)),
        ("binary", lib.BINARY_ADD, (positions, channels), (channels, 1), dtype),
    )
    who = f"batchnorm correction of ({positions}, {channels})"
    description = Description(who, "binary", lib.BINARY_MUL, layout, row, layout, attributes(then))
    return Primitive(description, (lib.SRC, lib.SRC_1, lib.DST, lib.post_op_source(0), lib.post_op_source(1)))


def _describe_forward(shape: Shape, dtype: int, epsilon: float, fused: bool, given: bool) -> Description:
    """Return the description of a forward pass; the backward pass takes it as a hint."""
    layout, flags = _layout(shape, dtype), _flags(fused, given)
    who = f"batchnorm of {shape}"
    return Description(who, "batch_normalization_forward", lib.FORWARD, layout, layout, epsilon, flags, attributes())


def _flags(fused: bool, given: bool) -> int:
    """Return the flags: gamma and beta always, fused ReLU, statistics that are given."""
    return lib.USE_SCALE | lib.USE_SHIFT | (lib.FUSE_RELU if fused else 0) | (lib.USE_GLOBAL_STATS if given else 0)


def _layout(shape: Shape, dtype: int) -> Handle:
    """Return how x is described: as images, or as one matrix (M, C) where that is faster or there are no pixels."""
    channels, size = shape[-1], int(np.prod(shape))
    if len(shape) != 4 or (channels >= ROWS_FROM_CHANNELS and 4 * size >= ROWS_FROM_BYTES):
        return matrix(size // channels, channels, dtype)
    return images(shape, dtype)


def _float32(x: np.ndarray) -> np.ndarray:
    """Return `x` in single precision, C-ordered."""
    return np.ascontiguousarray(x, np.float32)
