"""ReLU, leaky ReLU, and the sum of two branches; backward works from the output, so that no input need be kept."""

from __future__ import annotations

from hpcnn.arrays import Array
from hpcnn.errors import ShapeError
from hpcnn.ops import check
from hpcnn.ops.backend import implementation
from hpcnn.ops.cpu.activation import LEAKY_SLOPE as LEAKY_SLOPE


def activation_forward(x: Array, kind: str) -> Array:
    """Return max(x, 0) for "relu", max(x, 0.1 x) for "leaky_relu".

    Parameters
    ----------
    x : Array
        Of any shape.
    kind : {"relu", "leaky_relu"}

    Returns
    -------
    Array, shape of x

    Raises
    ------
    ShapeError
        If `kind` is unknown.
    """
    _check_kind(kind)
    return implementation(x).activation_forward(check.contiguous(x), kind)


def activation_backward(grad_output: Array, y: Array, kind: str) -> Array:
    """Return the gradient with respect to the activation's input, from its output; at zero the lower slope counts.

    Parameters
    ----------
    grad_output : Array
        Gradient with respect to `y`.
    y : Array, shape of grad_output
        Output of the forward pass; it has the sign of the input.
    kind : {"relu", "leaky_relu"}

    Returns
    -------
    Array, shape of grad_output

    Raises
    ------
    ShapeError
        If `kind` is unknown or the shapes differ.
    """
    _check_kind(kind)
    check.like("activation", "y", y, tuple(grad_output.shape), grad_output.dtype)
    return implementation(y).activation_backward(check.contiguous(grad_output), check.contiguous(y), kind)


def add_forward(a: Array, b: Array, activation: str | None = None) -> Array:
    """Return a + b, through an activation. Both gradients of the sum are its output's.

    Parameters
    ----------
    a, b : Array
        Of one shape.
    activation : {"relu", "leaky_relu"}, optional

    Returns
    -------
    Array, shape of a

    Raises
    ------
    ShapeError
        If the shapes differ or `activation` is unknown.
    """
    check.activation("add", activation)
    check.like("add", "b", b, tuple(a.shape), a.dtype)
    return implementation(a).add_forward(check.contiguous(a), check.contiguous(b), activation)


def _check_kind(kind: str) -> None:
    """Raise unless `kind` names an activation."""
    if kind is None:
        raise ShapeError("activation: kind is None; it must name an activation.")
    check.activation("activation", kind)
