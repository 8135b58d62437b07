"""Batch normalisation in NumPy. Legend: M positions (samples times pixels), C channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcnn.arrays import empty, empty_like
from hpcnn.ops.cpu.activation import activate, gate
from hpcnn.ops.cpu.blocks import column_sums, row_blocks


def batchnorm_statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """See `hpcnn.ops.batchnorm_statistics`; float64.

    Each sample's own mean and variance, combined in float64: the bits do not depend on who holds which samples.
    """
    count, channels = x.shape[0], x.shape[-1]
    means, variances = np.empty((2, count, channels))
    for sample, mean, var in zip(x.reshape(count, -1, channels), means, variances, strict=True):
        mean[...] = column_sums(sample) / len(sample)
        var.fill(0)
        centre = mean.astype(x.dtype)
        for block in row_blocks(*sample.shape):
            centred = sample[block] - centre
            var += column_sums(np.multiply(centred, centred, out=centred))
        # The mean was rounded to the type of x before it was subtracted; the shift theorem takes that out again.
        var[...] = np.maximum(var / len(sample) - np.square(mean - centre), 0.0)
    mean = means.mean(axis=0)
    deviations = means - mean
    return mean, (variances + np.square(deviations)).mean(axis=0)


def batchnorm_forward(
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    *,
    epsilon: float,
    activation: str | None = None,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """See `hpcnn.ops.batchnorm_forward`."""
    mean, var = batchnorm_statistics(x) if statistics is None else statistics
    centre, scale = mean.astype(x.dtype), gamma * _inverse_deviation(var, epsilon)
    shift = (beta + (centre - mean) * scale).astype(x.dtype)  # makes up for the rounding of the mean
    scale, y = scale.astype(x.dtype), empty_like(x)
    mask = None if activation is None else empty(x.shape, bool)
    source, target = _flat(x), _flat(y)
    for block in row_blocks(*source.shape):
        part = np.subtract(source[block], centre, out=target[block])
        part *= scale
        part += shift
        if mask is not None:
            np.greater(part, 0, out=_flat(mask)[block])
            activate(part, activation, part)
    return y, mean, var, mask


def batchnorm_track(
    mean: np.ndarray, var: np.ndarray, running_mean: np.ndarray, running_var: np.ndarray, *, momentum: float, count: int
) -> None:
    """See `hpcnn.ops.batchnorm_track`."""
    running_mean += momentum * (mean - running_mean)
    running_var += momentum * (var * (count / max(count - 1, 1)) - running_var)


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
    source = _flat(x)
    count = len(source) if count is None else count
    centre, rstd = mean.astype(x.dtype), _inverse_deviation(var, epsilon)

    grad_input = empty_like(x)
    error = _error(grad_output, mask, activation, grad_input)
    sums = np.zeros((2, source.shape[1]))  # of the error, and of the error times the normalised input
    for block in row_blocks(*source.shape):
        sums[0] += column_sums(error[block])
        centred = source[block] - centre
        sums[1] += column_sums(np.multiply(centred, error[block], out=centred))
    sums[1] = (sums[1] - (mean - centre) * sums[0]) * rstd
    grad_gamma, grad_beta = out if out is not None else (empty_like(gamma), empty_like(gamma))
    grad_beta[...], grad_gamma[...] = sums
    if reduce_sum is not None:
        reduce_sum(sums)

    scale = gamma * rstd
    slope = -scale * rstd * sums[1] / count
    shift = ((centre - mean) * slope - scale * sums[0] / count).astype(x.dtype)
    scale, slope, target = scale.astype(x.dtype), slope.astype(x.dtype), _flat(grad_input)
    for block in row_blocks(*source.shape):
        centred = source[block] - centre
        centred *= slope
        centred += shift
        np.multiply(error[block], scale, out=target[block])
        target[block] += centred
    return grad_input, grad_gamma, grad_beta


def _error(grad_output: np.ndarray, mask: np.ndarray | None, activation: str | None, room: np.ndarray) -> np.ndarray:
    """Return the gradient (M, C) before the activation: `grad_output` itself without one, else written to `room`."""
    if mask is None or activation is None:
        return _flat(grad_output)
    grad, positive, error = _flat(grad_output), _flat(mask), _flat(room)
    for block in row_blocks(*grad.shape):
        gate(grad[block], positive[block], activation, error[block])
    return error


def _inverse_deviation(var: np.ndarray, epsilon: float) -> np.ndarray:
    """Return 1 / sqrt(var + epsilon) in float64."""
    return np.asarray(1.0 / np.sqrt(var.astype(np.float64) + epsilon))


def _flat(x: np.ndarray) -> np.ndarray:
    """Return a view (M, C) of an array (..., C)."""
    return x.reshape(-1, x.shape[-1])
