"""Maximum, average and global average pooling, forward and backward.

Legend: N samples, H W input rows and columns, C channels, R S window rows and columns, P Q output rows and columns.
"""

from __future__ import annotations

from hpcnn.arrays import Array, Padding, Pair
from hpcnn.errors import ShapeError
from hpcnn.geometry import four_sided, output_size, pair
from hpcnn.ops import check
from hpcnn.ops.backend import implementation


def maxpool2d_forward(
    x: Array, window: int | Pair, *, stride: int | Pair | None = None, padding: int | Pair | Padding = 0
) -> tuple[Array, Array]:
    """Return the largest pixel of each window, and where it was.

    Parameters
    ----------
    x : Array, shape (N, H, W, C)
    window : int or (rows, columns)
        Window size (R, S).
    stride : int or (rows, columns), optional
        Steps between windows; the window itself when left out.
    padding : int, (rows, columns) or ((top, bottom), (left, right))
        Border that never wins; smaller than the window.

    Returns
    -------
    y : Array, shape (N, P, Q, C)
    argmax : Array of uint8 or int32, shape (N, P, Q, C)
        Place r * S + s of the first maximum inside its window; uint8 when the window has at most 255 places.

    Raises
    ------
    ShapeError
        If the window does not fit, or could lie in the padding altogether.
    """
    backend = implementation(x)
    check.rank("maxpool2d", "x", x, "NHWC")
    window, stride, padding = _normalise(window, stride, padding)
    output_size(x.shape[1:3], window, stride, padding)
    _check_padding(window, padding)
    return backend.maxpool2d_forward(check.contiguous(x), window, stride=stride, padding=padding)


def maxpool2d_backward(
    grad_output: Array,
    argmax: Array,
    input_size: Pair,
    window: int | Pair,
    *,
    stride: int | Pair | None = None,
    padding: int | Pair | Padding = 0,
) -> Array:
    """Return the gradient of maximum pooling: each window's gradient goes to the pixel that won.

    Parameters
    ----------
    grad_output : Array, shape (N, P, Q, C)
    argmax : Array, shape (N, P, Q, C)
        From the forward pass.
    input_size : tuple of int
        Rows and columns (H, W) of the input.
    window, stride, padding
        As in the forward pass.

    Returns
    -------
    Array, shape (N, H, W, C)

    Raises
    ------
    ShapeError
        If shapes do not fit together.
    """
    backend = implementation(grad_output)
    window, stride, padding = _normalise(window, stride, padding)
    _check_gradient("maxpool2d", grad_output, input_size, window, stride, padding)
    _check_padding(window, padding)
    check.like("maxpool2d", "argmax", argmax, tuple(grad_output.shape), argmax.dtype)
    return backend.maxpool2d_backward(
        check.contiguous(grad_output),
        check.contiguous(argmax),
        (input_size[0], input_size[1]),
        window,
        stride=stride,
        padding=padding,
    )


def avgpool2d_forward(
    x: Array, window: int | Pair, *, stride: int | Pair | None = None, padding: int | Pair | Padding = 0
) -> Array:
    """Return the mean of each window; padding counts as zeros, so the divisor is always R * S.

    Parameters
    ----------
    x : Array, shape (N, H, W, C)
    window : int or (rows, columns)
        Window size (R, S).
    stride : int or (rows, columns), optional
        Steps between windows; the window itself when left out.
    padding : int, (rows, columns) or ((top, bottom), (left, right))
        Zeros around each image.

    Returns
    -------
    Array, shape (N, P, Q, C)

    Raises
    ------
    ShapeError
        If the window does not fit.
    """
    backend = implementation(x)
    check.rank("avgpool2d", "x", x, "NHWC")
    window, stride, padding = _normalise(window, stride, padding)
    output_size(x.shape[1:3], window, stride, padding)
    return backend.avgpool2d_forward(check.contiguous(x), window, stride=stride, padding=padding)


def avgpool2d_backward(
    grad_output: Array,
    input_size: Pair,
    window: int | Pair,
    *,
    stride: int | Pair | None = None,
    padding: int | Pair | Padding = 0,
) -> Array:
    """Return the gradient of average pooling: each window's gradient is spread evenly over its places.

    Parameters
    ----------
    grad_output : Array, shape (N, P, Q, C)
    input_size : tuple of int
        Rows and columns (H, W) of the input.
    window, stride, padding
        As in the forward pass.

    Returns
    -------
    Array, shape (N, H, W, C)

    Raises
    ------
    ShapeError
        If shapes do not fit together.
    """
    backend = implementation(grad_output)
    window, stride, padding = _normalise(window, stride, padding)
    _check_gradient("avgpool2d", grad_output, input_size, window, stride, padding)
    return backend.avgpool2d_backward(
        check.contiguous(grad_output), (input_size[0], input_size[1]), window, stride=stride, padding=padding
    )


def global_avgpool_forward(x: Array) -> Array:
    """Return the mean over all rows and columns.

    Parameters
    ----------
    x : Array, shape (N, H, W, C)

    Returns
    -------
    Array, shape (N, C)

    Raises
    ------
    ShapeError
        If `x` is not a batch of images.
    """
    backend = implementation(x)
    check.rank("global_avgpool", "x", x, "NHWC")
    return backend.global_avgpool_forward(check.contiguous(x))


def global_avgpool_backward(grad_output: Array, input_size: Pair) -> Array:
    """Return the gradient of global average pooling.

    Parameters
    ----------
    grad_output : Array, shape (N, C)
    input_size : tuple of int
        Rows and columns (H, W) of the input.

    Returns
    -------
    Array, shape (N, H, W, C)

    Raises
    ------
    ShapeError
        If `grad_output` is not (N, C).
    """
    backend = implementation(grad_output)
    check.rank("global_avgpool", "grad_output", grad_output, "NC")
    return backend.global_avgpool_backward(check.contiguous(grad_output), (input_size[0], input_size[1]))


def _normalise(
    window: int | Pair, stride: int | Pair | None, padding: int | Pair | Padding
) -> tuple[Pair, Pair, Padding]:
    """Return window, stride and padding in full."""
    window = pair(window)
    return window, window if stride is None else pair(stride), four_sided(padding)


def _check_padding(window: Pair, padding: Padding) -> None:
    """Raise if a window could hold no pixel at all."""
    if max(padding[0]) >= window[0] or max(padding[1]) >= window[1]:
        raise ShapeError(
            f"maxpool2d: padding (={padding}) must be smaller than the window (={window});"
            " a window in the padding has no maximum. Use less padding."
        )


def _check_gradient(
    who: str, grad_output: Array, input_size: Pair, window: Pair, stride: Pair, padding: Padding
) -> None:
    """Raise unless `grad_output` has the output size of (H, W)."""
    check.rank(who, "grad_output", grad_output, "NPQC")
    size = output_size(input_size, window, stride, padding)
    shape = (grad_output.shape[0], *size, grad_output.shape[3])
    check.like(who, "grad_output", grad_output, shape, grad_output.dtype)
