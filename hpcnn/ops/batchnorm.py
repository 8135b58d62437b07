"""Batch normalisation over all axes but the last, optionally with a fused activation, forward and backward.

The batch may be spread over many arrays: statistics can be handed in, and the backward pass takes a `reduce_sum` that
adds its two sums over everyone who holds a part. Legend: C channels; `...` samples, and rows and columns for images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcnn.arrays import Array, Shape
from hpcnn.errors import ShapeError
from hpcnn.ops import check
from hpcnn.ops.backend import implementation

WHO = "batchnorm"


def batchnorm_statistics(x: Array) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel, of this array only.

    Parameters
    ----------
    x : Array, shape (..., C)

    Returns
    -------
    mean, var : Array of float64, shape (C,)
        Computed in two passes, so that a large mean does not spoil a small variance.

    Raises
    ------
    ShapeError
        If `x` is empty or has fewer than two axes.
    """
    backend = implementation(x)
    _check_input("x", x)
    return backend.batchnorm_statistics(check.contiguous(x))


def batchnorm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    *,
    epsilon: float,
    activation: str | None = None,
    statistics: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """Return (x - mean) / sqrt(var + epsilon) * gamma + beta, through an activation.

    Parameters
    ----------
    x : Array, shape (..., C)
    gamma, beta : Array, shape (C,)
        Scale and shift.
    epsilon : float
        Added to the variance.
    activation : {"relu", "leaky_relu"}, optional
        Applied to the result.
    statistics : (mean, var), optional
        Statistics to use, each of shape (C,): those of the whole batch, or running ones. Left out: those of `x`.

    Returns
    -------
    y : Array, shape (..., C)
    mean, var : Array, shape (C,)
        The statistics that were used.
    mask : Array or None
        What the backward pass of the same implementation needs to undo the activation; None without one.

    Raises
    ------
    ShapeError
        If shapes or element types do not fit together.

    References
    ----------
    Ioffe and Szegedy, Batch normalization, arXiv:1502.03167.
    """
    backend = implementation(x)
    _check_input("x", x)
    check.activation(WHO, activation)
    channels = _channels(x)
    check.like(WHO, "gamma", gamma, channels, check.parameter_dtype(x))
    check.like(WHO, "beta", beta, channels, check.parameter_dtype(x))
    for array in statistics or ():
        check.like(WHO, "statistics", array, channels, array.dtype)
    return backend.batchnorm_forward(
        check.contiguous(x), gamma, beta, epsilon=epsilon, activation=activation, statistics=statistics
    )


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
    reduce_sum: Callable[[np.ndarray], None] | None = None,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Return the gradients with respect to input, gamma and beta, the statistics being functions of the whole batch.

    Parameters
    ----------
    grad_output : Array, shape (..., C)
        Gradient of the loss with respect to the output (behind the activation).
    x : Array, shape (..., C)
        Input of the forward pass.
    gamma : Array, shape (C,)
    mean, var : Array, shape (C,)
        Statistics that the forward pass used.
    mask : Array or None
        From the forward pass.
    epsilon, activation
        As in the forward pass.
    count : int, optional
        Positions a channel has in the whole batch; those of `x` when left out.
    reduce_sum : callable, optional
        Sums a float64 array in place over everyone who holds a part of the batch. Left out: `x` is all of it.
    out : (Array, Array), optional
        Where to put the gradients of gamma and beta; overwritten.

    Returns
    -------
    grad_input : Array, shape (..., C)
    grad_gamma, grad_beta : Array, shape (C,)
        Summed over the positions of `x` only, never over the others'.

    Raises
    ------
    ShapeError
        If shapes or element types do not fit together.
    """
    backend = implementation(x)
    _check_input("x", x)
    check.activation(WHO, activation)
    channels = _channels(x)
    check.like(WHO, "grad_output", grad_output, tuple(x.shape), x.dtype)
    check.like(WHO, "gamma", gamma, channels, check.parameter_dtype(x))
    check.like(WHO, "mean", mean, channels, mean.dtype)
    check.like(WHO, "var", var, channels, var.dtype)
    if (activation is None) != (mask is None):
        raise ShapeError(f"{WHO}: activation (={activation!r}) needs the mask of its forward pass, and only then.")
    check.outputs(WHO, out, (channels, channels), check.parameter_dtype(x))
    return backend.batchnorm_backward(
        check.contiguous(grad_output),
        check.contiguous(x),
        gamma,
        mean,
        var,
        mask,
        epsilon=epsilon,
        activation=activation,
        count=count,
        reduce_sum=reduce_sum,
        out=out,
    )


def batchnorm_track(
    mean: Array, var: Array, running_mean: Array, running_var: Array, *, momentum: float, count: int
) -> None:
    """Move running statistics towards those of a batch, in place: running += momentum * (batch - running).

    Parameters
    ----------
    mean, var : Array, shape (C,)
        Mean and biased variance of the batch.
    running_mean, running_var : Array, shape (C,)
        The variance is tracked as the unbiased estimate.
    momentum : float
        Weight of the batch.
    count : int
        Positions that a channel has in the batch.

    Raises
    ------
    ShapeError
        If the shapes differ.
    """
    for name, array in (("var", var), ("running_mean", running_mean), ("running_var", running_var)):
        if array.shape != mean.shape:
            check.like(WHO, name, array, tuple(mean.shape), array.dtype)
    implementation(running_mean).batchnorm_track(mean, var, running_mean, running_var, momentum=momentum, count=count)


def _check_input(name: str, x: Array) -> None:
    """Raise unless `x` has samples and channels."""
    if x.ndim < 2 or 0 in x.shape:
        raise ShapeError(f"{WHO}: {name} has shape {tuple(x.shape)}; it must be (N, ..., C), every extent at least 1.")


def _channels(x: Array) -> Shape:
    """Return the shape (C,) of everything that exists once a channel."""
    return (x.shape[-1],)
