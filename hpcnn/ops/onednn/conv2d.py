"""Convolutions by oneDNN: images as they lie (NHWC), filters in whatever blocks the implementation likes best.

Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows
and columns, G groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hpcnn.arrays import Padding, Pair, Shape, empty
from hpcnn.geometry import NO_PADDING, output_size
from hpcnn.ops import cpu
from hpcnn.ops.onednn import library as lib
from hpcnn.ops.onednn import linear, products
from hpcnn.ops.onednn.primitive import (
    Description,
    Handle,
    Primitive,
    address,
    attributes,
    cached,
    data_type,
    descriptor,
    extents,
    images,
    plain,
    relu,
    vector,
)

FEW_CHANNELS = 128


class _Geometry(NamedTuple):
    """Everything that decides a convolution's primitives."""

    source: Shape  # (N, H, W, C)
    filters: Shape  # (K, R, S, C / G)
    stride: Pair
    padding: Padding
    dilation: Pair
    groups: int
    data_type: int  # of images; filters, biases and their gradients lie in float32

    @property
    def target(self) -> Shape:
        """Shape (N, P, Q, K) of the output."""
        (N, H, W, _), (K, R, S, _) = self.source, self.filters
        return N, *output_size((H, W), (R, S), self.stride, self.padding, self.dilation), K

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two matrices as they lie: filters of one pixel, at every pixel."""
        return self.filters[1:3] == (1, 1) and self.stride == (1, 1) and self.padding == NO_PADDING and self.groups == 1


def conv2d_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Padding = NO_PADDING,
    dilation: Pair = (1, 1),
    groups: int = 1,
    activation: str | None = None,
) -> np.ndarray:
    """See `hpcnn.ops.conv2d_forward`."""
    geometry = _Geometry(x.shape, weight.shape, stride, padding, dilation, groups, data_type(x))
    primitive = _forward(geometry, bias is not None, activation)
    if primitive is None:
        parameters = _parameters(geometry)
        return cpu.conv2d_forward(x, weight, bias, activation=activation, **parameters)
    x, weight, y = plain(x), plain(weight), empty(geometry.target, x.dtype)
    if bias is None:
        primitive(address(x), address(weight), address(y))
    else:
        bias = plain(bias)
        primitive(address(x), address(weight), address(y), address(bias))
    return y


def conv2d_backward_input(
    grad_output: np.ndarray,
    weight: np.ndarray,
    input_size: Pair,
    *,
    stride: Pair = (1, 1),
    padding: Padding = NO_PADDING,
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """See `hpcnn.ops.conv2d_backward_input`."""
    source = (grad_output.shape[0], *input_size, weight.shape[3] * groups)
    geometry = _Geometry(source, weight.shape, stride, padding, dilation, groups, data_type(grad_output))
    primitive = _backward_input(geometry)
    if primitive is None:
        return cpu.conv2d_backward_input(grad_output, weight, input_size, **_parameters(geometry))
    grad_output, weight, grad_input = plain(grad_output), plain(weight), empty(source, grad_output.dtype)
    primitive(address(grad_input), address(weight), address(grad_output))
    return grad_input


def weight_gradient_is_right(
    x: np.ndarray, _: np.ndarray, kernel_size: Pair, *, stride: Pair = (1, 1), dilation: Pair = (1, 1), **__: Any
) -> bool:
    """Return whether the weight gradient from bfloat16 images may be left to the library.

    Version 3.2 returns wrong numbers for some dilated filters, and for some images hardly wider than a filter that
    moves by more than a pixel.
    """
    wide_enough = stride[1] == 1 or x.shape[2] >= kernel_size[1] + stride[1]
    return lib.computes_bfloat16() and dilation == (1, 1) and wide_enough


def conv2d_backward_weight(
    x: np.ndarray,
    grad_output: np.ndarray,
    kernel_size: Pair,
    *,
    stride: Pair = (1, 1),
    padding: Padding = NO_PADDING,
    dilation: Pair = (1, 1),
    groups: int = 1,
    bias: bool = True,
    out: tuple[np.ndarray, np.ndarray | None] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """See `hpcnn.ops.conv2d_backward_weight`."""
    filters = (grad_output.shape[3], *kernel_size, x.shape[3] // groups)
    geometry = _Geometry(x.shape, filters, stride, padding, dilation, groups, data_type(x))
    x, grad_output = plain(x), plain(grad_output)
    grad_weight, grad_bias = out if out is not None else (empty(filters), empty(filters[0]) if bias else None)
    window = products.Window(kernel_size, stride, padding, dilation)
    if groups == 1 and x.dtype == np.float32 and window.pays(x.shape[3], *grad_output.shape[2:]):
        both = products.backward_weight(x, grad_output, window)
        grad_weight.reshape(filters[0], -1)[...] = both[:-1].T
        if bias and grad_bias is not None:
            grad_bias[...] = both[-1]
        return grad_weight, grad_bias
    primitive = _backward_weight(geometry, bias)
    if primitive is None:
        return cpu.conv2d_backward_weight(x, grad_output, kernel_size, bias=bias, out=out, **_parameters(geometry))
    addresses = [address(x), address(grad_weight), address(grad_output)]
    if bias and grad_bias is not None:
        addresses.append(address(grad_bias))
    primitive(*addresses)
    return grad_weight, grad_bias


@cached
def _forward(geometry: _Geometry, bias: bool, activation: str | None) -> Primitive:
    """Return y = x * W + b through an activation; takes the addresses of x, W, y, and b where `bias`."""
    description = _describe_forward(geometry, bias, attributes(relu(activation)))
    arguments = [lib.SRC, lib.WEIGHTS, lib.DST, *([lib.BIAS] if bias else [])]
    return Primitive(description, arguments, (lib.WEIGHTS, _filters(geometry)))


@cached
def _backward_input(geometry: _Geometry) -> Primitive:
    """Return the gradient dx from W and dy; takes the addresses of dx, W and dy."""
    hint = _describe_forward(geometry, False, attributes())
    description = Description(
        _name("conv2d input gradient", geometry),
        "convolution_backward_data",
        lib.CONVOLUTION_DIRECT,
        images(geometry.source, geometry.data_type),
        _any_filters(geometry),
        images(geometry.target, geometry.data_type),
        *_window(geometry),
        hint.handle,
        attributes(),
    )
    return Primitive(description, (lib.DIFF_SRC, lib.WEIGHTS, lib.DIFF_DST), (lib.WEIGHTS, _filters(geometry)))


def _backward_weight(geometry: _Geometry, bias: bool) -> Primitive | None:
    """Return the gradients dW and db from x and dy; takes the addresses of x, dW, dy, and db where `bias`.

    On one thread a GEMM is faster than the library's 1x1 convolution, up to twice. On several it stays so where few
    channels spread to many; elsewhere the convolution divides its work better (within a tenth either way).
    """
    (N, H, W, C), K = geometry.source, geometry.filters[0]
    if (
        geometry.data_type == lib.F32
        and geometry.is_product
        and (lib.num_threads() == 1 or C <= min(K - 1, FEW_CHANNELS))
    ):
        return linear.backward_weight(N * H * W, C, K, bias)
    return _direct_backward_weight(geometry, bias)


@cached
def _direct_backward_weight(geometry: _Geometry, bias: bool) -> Primitive:
    """Return the gradients by the library's convolution."""
    hint = _describe_forward(geometry, False, attributes())
    description = Description(
        _name("conv2d weight gradient", geometry),
        "convolution_backward_weights",
        lib.CONVOLUTION_DIRECT,
        images(geometry.source, geometry.data_type),
        descriptor(_logical(geometry)),
        vector(geometry.filters[0]) if bias else None,
        images(geometry.target, geometry.data_type),
        *_window(geometry),
        hint.handle,
        attributes(),
    )
    arguments = [lib.SRC, lib.DIFF_WEIGHTS, lib.DIFF_DST, *([lib.DIFF_BIAS] if bias else [])]
    return Primitive(description, arguments, (lib.DIFF_WEIGHTS, _filters(geometry)))


def _describe_forward(geometry: _Geometry, bias: bool, attribute: Handle) -> Description:
    """Return the description of a forward pass; a backward pass takes it as a hint."""
    return Description(
        _name("conv2d", geometry),
        "convolution_forward",
        lib.FORWARD,
        lib.CONVOLUTION_DIRECT,
        images(geometry.source, geometry.data_type),
        _any_filters(geometry),
        vector(geometry.filters[0]) if bias else None,
        images(geometry.target, geometry.data_type),
        *_window(geometry),
        attribute,
    )


def _name(what: str, geometry: _Geometry) -> str:
    """Return the operation and its shapes for a message."""
    return (
        f"{what} of {geometry.source} with {geometry.filters}, stride {geometry.stride}, padding {geometry.padding},"
        f" dilation {geometry.dilation}, groups {geometry.groups}"
    )


def _window(geometry: _Geometry) -> tuple[Any, Any, Any, Any]:
    """Return strides, dilations (0 is dense), and the padding before and after."""
    before, after = zip(*geometry.padding, strict=True)
    return extents(geometry.stride), extents([d - 1 for d in geometry.dilation]), extents(before), extents(after)


def _logical(geometry: _Geometry) -> Shape:
    """Return the filters' shape as the library sees it: (K, C, R, S), or (G, K / G, C / G, R, S)."""
    filters, rows, columns, depth = geometry.filters
    if geometry.groups == 1:
        return filters, depth, rows, columns
    return geometry.groups, filters // geometry.groups, depth, rows, columns


def _any_filters(geometry: _Geometry) -> Handle:
    """Return the descriptor of filters in a format of the library's choice, of the images' type."""
    return descriptor(_logical(geometry), data_type=geometry.data_type)


def _filters(geometry: _Geometry) -> Handle:
    """Return the descriptor of filters as they lie in memory."""
    filters, rows, columns, depth = geometry.filters
    size = rows * columns * depth
    strides = (size, 1, columns * depth, depth)
    return descriptor(
        _logical(geometry), strides if geometry.groups == 1 else (filters // geometry.groups * size, *strides)
    )


def _parameters(geometry: _Geometry) -> dict[str, Any]:
    """Return the parameters that the three passes have in common, by name."""
    return {name: getattr(geometry, name) for name in ("stride", "padding", "dilation", "groups")}
