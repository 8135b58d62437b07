"""Dropout whose masks depend on the global sample index alone, never on which rank draws them."""

from __future__ import annotations

from math import prod

import numpy as np

from hpcnn.arrays import Array
from hpcnn.errors import ShapeError
from hpcnn.ops import check
from hpcnn.ops.backend import implementation


def dropout_forward(
    x: Array, rate: float, stream: int, samples: np.ndarray, elements: np.ndarray | None = None
) -> tuple[Array, Array]:
    """Zero each number with probability `rate` and scale the others by 1 / (1 - rate).

    Parameters
    ----------
    x : Array, shape (N, ...)
    rate : float
        At least 0 and below 1.
    stream : int
        Key of this layer and step, from `hpcnn.rng.key`.
    samples : ndarray of integers, shape (N,)
        Global index of each sample.
    elements : ndarray of integers, shape (elements of a sample,), optional
        The number of each element of a sample, where `x` holds some of it only; left out, they count from 0.

    Returns
    -------
    y : Array, shape of x
    mask : Array of bool, shape of x
        True where a number was kept.

    Raises
    ------
    ShapeError
        If there is not one index for each sample and each of its elements, or `rate` is out of range.
    """
    backend = implementation(x)
    _check_rate(rate)
    if x.ndim < 2 or samples.shape != (x.shape[0],):
        raise ShapeError(
            f"dropout: samples of shape {samples.shape} for x of shape {tuple(x.shape)};"
            " there must be one index for each sample."
        )
    numbers = np.arange(prod(x.shape[1:])) if elements is None else elements
    if numbers.shape != (prod(x.shape[1:]),):
        raise ShapeError(
            f"dropout: elements of shape {numbers.shape} for x of shape {tuple(x.shape)};"
            " there must be one number for each element of a sample."
        )
    return backend.dropout_forward(check.contiguous(x), rate, stream, samples, numbers)


def dropout_backward(grad_output: Array, mask: Array, rate: float) -> Array:
    """Return the gradient with respect to the input.

    Parameters
    ----------
    grad_output : Array, shape (N, ...)
    mask : Array of bool, shape of grad_output
        From the forward pass.
    rate : float
        As in the forward pass.

    Returns
    -------
    Array, shape of grad_output

    Raises
    ------
    ShapeError
        If shapes differ, or `rate` is out of range.
    """
    backend = implementation(grad_output)
    _check_rate(rate)
    check.like("dropout", "mask", mask, tuple(grad_output.shape), np.dtype(bool))
    return backend.dropout_backward(check.contiguous(grad_output), mask, rate)


def _check_rate(rate: float) -> None:
    """Raise unless 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ShapeError(f"dropout: rate (={rate}) must be at least 0 and below 1.")
