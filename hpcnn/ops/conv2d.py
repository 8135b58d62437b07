"""2-D convolution (cross-correlation), forward and the two gradients.

Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows
and columns.
"""

from __future__ import annotations

from hpcnn.arrays import Array, Padding, Pair, Shape
from hpcnn.errors import ShapeError
from hpcnn.geometry import four_sided, output_size, pair
from hpcnn.ops import check
from hpcnn.ops.backend import implementation

WHO = "conv2d"


def conv2d_forward(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | Padding = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Array:
    """Return the convolution of images with filters, plus bias, through an activation.

    Parameters
    ----------
    x : Array, shape (N, H, W, C)
        Images.
    weight : Array, shape (K, R, S, C / groups)
        Filters; filter k reads the channels of group k // (K / groups).
    bias : Array, shape (K,), optional
        Added to every pixel.
    stride, dilation : int or (rows, columns)
        Steps between windows, and between the pixels of one window.
    padding : int, (rows, columns) or ((top, bottom), (left, right))
        Zeros around each image.
    groups : int
        Number of independent groups of channels.
    activation : {"relu", "leaky_relu"}, optional
        Applied to the sum.

    Returns
    -------
    Array, shape (N, P, Q, K)

    Raises
    ------
    ShapeError
        If shapes or element types do not fit together.

    References
    ----------
    Chetlur et al., cuDNN: efficient primitives for deep learning, arXiv:1410.0759.
    """
    backend = implementation(x)
    check.rank(WHO, "x", x, "NHWC")
    check.rank(WHO, "weight", weight, "KRSC")
    check.activation(WHO, activation)
    stride, padding, dilation = pair(stride), four_sided(padding), pair(dilation)
    filters, rows, columns, _ = weight.shape
    _check_groups(x.shape[3], filters, groups)
    check.like(WHO, "weight", weight, (filters, rows, columns, x.shape[3] // groups), check.parameter_dtype(x))
    if bias is not None:
        check.like(WHO, "bias", bias, (filters,), check.parameter_dtype(x))
        bias = check.contiguous(bias)
    output_size(x.shape[1:3], (rows, columns), stride, padding, dilation)  # raises where the window does not fit
    return backend.conv2d_forward(
        check.contiguous(x),
        check.contiguous(weight),
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        activation=activation,
    )


def conv2d_backward_input(
    grad_output: Array,
    weight: Array,
    input_size: Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | Padding = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Array:
    """Return the gradient of a convolution with respect to its input.

    Parameters
    ----------
    grad_output : Array, shape (N, P, Q, K)
        Gradient of the loss with respect to the convolution's sum (before any activation).
    weight : Array, shape (K, R, S, C / groups)
        Filters of the forward pass.
    input_size : tuple of int
        Rows and columns (H, W) of the input.
    stride, padding, dilation, groups
        As in the forward pass.

    Returns
    -------
    Array, shape (N, H, W, C)

    Raises
    ------
    ShapeError
        If (P, Q) is not the output size of (H, W), or other shapes do not fit.
    """
    backend = implementation(grad_output)
    check.rank(WHO, "grad_output", grad_output, "NPQK")
    check.rank(WHO, "weight", weight, "KRSC")
    stride, padding, dilation = pair(stride), four_sided(padding), pair(dilation)
    filters, rows, columns, depth = weight.shape
    _check_groups(depth * groups, filters, groups)
    check.like(WHO, "weight", weight, weight.shape, check.parameter_dtype(grad_output))
    size = output_size(input_size, (rows, columns), stride, padding, dilation)
    check.like(WHO, "grad_output", grad_output, (grad_output.shape[0], *size, filters), grad_output.dtype)
    return backend.conv2d_backward_input(
        check.contiguous(grad_output),
        check.contiguous(weight),
        (input_size[0], input_size[1]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def conv2d_backward_weight(
    x: Array,
    grad_output: Array,
    kernel_size: Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | Padding = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    bias: bool = True,
    out: tuple[Array, Array | None] | None = None,
) -> tuple[Array, Array | None]:
    """Return the gradients of a convolution with respect to its weight and bias, summed over the samples of `x`.

    Parameters
    ----------
    x : Array, shape (N, H, W, C)
        Input of the forward pass.
    grad_output : Array, shape (N, P, Q, K)
        Gradient of the loss with respect to the convolution's sum (before any activation).
    kernel_size : tuple of int
        Filter rows and columns (R, S).
    stride, padding, dilation, groups
        As in the forward pass.
    bias : bool
        Whether the bias gradient is wanted.
    out : (Array, Array or None), optional
        Where to put the two gradients; overwritten.

    Returns
    -------
    grad_weight : Array, shape (K, R, S, C / groups)
    grad_bias : Array, shape (K,), or None where `bias` is False

    Raises
    ------
    ShapeError
        If (P, Q) is not the output size of (H, W), or other shapes do not fit.
    """
    backend = implementation(x)
    check.rank(WHO, "x", x, "NHWC")
    check.rank(WHO, "grad_output", grad_output, "NPQK")
    stride, padding, dilation, kernel_size = pair(stride), four_sided(padding), pair(dilation), pair(kernel_size)
    count, channels, filters = x.shape[0], x.shape[3], grad_output.shape[3]
    _check_groups(channels, filters, groups)
    size = output_size(x.shape[1:3], kernel_size, stride, padding, dilation)
    check.like(WHO, "grad_output", grad_output, (count, *size, filters), x.dtype)
    weight_shape: Shape = (filters, *kernel_size, channels // groups)
    check.outputs(WHO, out, (weight_shape, (filters,) if bias else None), check.parameter_dtype(x))
    return backend.conv2d_backward_weight(
        check.contiguous(x),
        check.contiguous(grad_output),
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        out=out,
    )


def _check_groups(channels: int, filters: int, groups: int) -> None:
    """Raise unless channels and filters split evenly."""
    if groups < 1 or channels % groups or filters % groups:
        raise ShapeError(
            f"{WHO}: in_channels (={channels}) and out_channels (={filters}) must be divisible by groups (={groups})."
        )
