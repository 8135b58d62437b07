"""Assertions that many tests share: closeness by relative norm, gradients, adjoints, and verdicts of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def relative_error(expected: Any, actual: Any) -> float:
    """Return max |actual - expected| / max |expected|; the absolute error where `expected` is all zero."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    assert expected.shape == actual.shape, f"expected shape {expected.shape}, got {actual.shape}"
    if expected.size == 0:
        return 0.0
    error = np.abs(actual - expected).max()
    return float(error / (np.abs(expected).max() or 1.0))


def assert_close(expected: Any, actual: Any, tolerance: float = 1e-5, name: str = "") -> None:
    """Fail unless shapes are equal and the relative error is at most `tolerance`; NaN and infinity are never close."""
    error = relative_error(expected, actual)
    assert error <= tolerance, f"{name or 'array'}: relative error {error:.3e} is above {tolerance:.1e}"


def assert_grad(
    function: Callable[[np.ndarray], float],
    x: np.ndarray,
    grad: np.ndarray,
    tolerance: float = 1e-7,
    step: float = 1e-5,
) -> None:
    """Fail unless `grad` is the gradient of the scalar `function` at `x`, by central differences in float64.

    `function` must be smooth within `step` of `x`, in every element.
    """
    assert x.dtype == np.float64, f"central differences need float64, got {x.dtype}"
    numeric = np.empty(x.shape)
    for index in np.ndindex(*x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        numeric[index] = (function(above) - function(below)) / (above[index] - below[index])
    assert_close(numeric, grad, tolerance, "gradient")


def assert_adjoint(forward_x: Any, g: Any, x: Any, adjoint_g: Any, tolerance: float = 1e-6) -> None:
    """Fail unless <F x, g> = <x, F* g>, relative to the product of the norms."""
    forward_x, g, x, adjoint_g = (np.asarray(array, np.float64).ravel() for array in (forward_x, g, x, adjoint_g))
    left, right = forward_x @ g, x @ adjoint_g
    scale = np.linalg.norm(forward_x) * np.linalg.norm(g) + np.linalg.norm(x) * np.linalg.norm(adjoint_g)
    assert scale > 0, "the adjoint test says nothing about zeros"
    assert abs(left - right) <= tolerance * scale, f"<Fx, g> = {left!r} but <x, F*g> = {right!r}"


def spmd_assert(comm: Any, ok: Any, message: str = "") -> None:
    """Fail on every rank, naming those at fault, if `ok` is false on any (collective)."""
    verdicts = comm.allgather((bool(ok), message))
    failed = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(verdicts) if not good]
    assert not failed, "; ".join(failed)
