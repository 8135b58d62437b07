"""Fully connected layer y = x W^T + b, forward and the two gradients.

Weights and their gradients have shape (O, I) and may lie in memory in either order, C or Fortran (a transposed view of
a C-ordered (I, O)); both are read and written as they lie.
Legend: N samples, I input features, O output features.
"""

from __future__ import annotations

from hpcnn.arrays import Array
from hpcnn.ops import check
from hpcnn.ops.backend import implementation

WHO = "linear"


def linear_forward(x: Array, weight: Array, bias: Array | None = None, *, activation: str | None = None) -> Array:
    """Return x W^T + b, through an activation.

    Parameters
    ----------
    x : Array, shape (N, I)
    weight : Array, shape (O, I)
    bias : Array, shape (O,), optional
    activation : {"relu", "leaky_relu"}, optional

    Returns
    -------
    Array, shape (N, O)

    Raises
    ------
    ShapeError
        If shapes or element types do not fit together.
    """
    backend = implementation(x)
    check.rank(WHO, "x", x, "NI")
    check.rank(WHO, "weight", weight, "OI")
    check.activation(WHO, activation)
    check.like(WHO, "weight", weight, (weight.shape[0], x.shape[1]), check.parameter_dtype(x))
    if bias is not None:
        check.like(WHO, "bias", bias, (weight.shape[0],), check.parameter_dtype(x))
        bias = check.contiguous(bias)
    return backend.linear_forward(check.contiguous(x), check.matrix(weight), bias, activation=activation)


def linear_backward_input(grad_output: Array, weight: Array) -> Array:
    """Return the gradient with respect to the input.

    Parameters
    ----------
    grad_output : Array, shape (N, O)
        Gradient of the loss with respect to x W^T + b (before any activation).
    weight : Array, shape (O, I)

    Returns
    -------
    Array, shape (N, I)

    Raises
    ------
    ShapeError
        If shapes or element types do not fit together.
    """
    backend = implementation(grad_output)
    check.rank(WHO, "grad_output", grad_output, "NO")
    check.rank(WHO, "weight", weight, "OI")
    check.like(WHO, "weight", weight, (grad_output.shape[1], weight.shape[1]), check.parameter_dtype(grad_output))
    return backend.linear_backward_input(check.contiguous(grad_output), check.matrix(weight))


def linear_backward_weight(
    x: Array, grad_output: Array, *, bias: bool = True, out: tuple[Array, Array | None] | None = None
) -> tuple[Array, Array | None]:
    """Return the gradients with respect to weight and bias, summed over the samples of `x`.

    Parameters
    ----------
    x : Array, shape (N, I)
        Input of the forward pass.
    grad_output : Array, shape (N, O)
        Gradient of the loss with respect to x W^T + b (before any activation).
    bias : bool
        Whether the bias gradient is wanted.
    out : (Array, Array or None), optional
        Where to put the two gradients; overwritten.

    Returns
    -------
    grad_weight : Array, shape (O, I)
    grad_bias : Array, shape (O,), or None where `bias` is False

    Raises
    ------
    ShapeError
        If shapes or element types do not fit together.
    """
    backend = implementation(x)
    check.rank(WHO, "x", x, "NI")
    check.rank(WHO, "grad_output", grad_output, "NO")
    outputs = grad_output.shape[1]
    check.like(WHO, "grad_output", grad_output, (x.shape[0], outputs), x.dtype)
    shapes = ((outputs, x.shape[1]), (outputs,) if bias else None)
    check.outputs(WHO, out, shapes, check.parameter_dtype(x), either_order=True)
    return backend.linear_backward_weight(check.contiguous(x), check.contiguous(grad_output), bias=bias, out=out)
