"""Maximum, average and global average pooling by oneDNN.

The library's workspace of maximum pooling is the place of the first maximum in its window, bytes or 32-bit integers
as in `hpcnn.ops.maxpool2d_forward`.
Legend: N samples, H W input rows and columns, C channels, R S window rows and columns, P Q output rows and columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hpcnn.arrays import Padding, Pair, Shape, empty
from hpcnn.geometry import NO_PADDING, output_size
from hpcnn.ops import cpu
from hpcnn.ops.cpu.pool2d import LARGEST_BYTE_WINDOW
from hpcnn.ops.onednn import library as lib
from hpcnn.ops.onednn.primitive import (
    Description,
    Primitive,
    address,
    attributes,
    cached,
    data_type,
    extents,
    images,
    plain,
)


class _Geometry(NamedTuple):
    """Everything that decides a pooling's primitives."""

    algorithm: int
    source: Shape  # (N, H, W, C)
    window: Pair
    stride: Pair
    padding: Padding
    data_type: int

    @property
    def target(self) -> Shape:
        """Shape (N, P, Q, C) of the output."""
        N, H, W, C = self.source
        return N, *output_size((H, W), self.window, self.stride, self.padding), C

    @property
    def place_type(self) -> type:
        """Element type of the places of maxima."""
        return np.uint8 if self.window[0] * self.window[1] <= LARGEST_BYTE_WINDOW else np.int32


def adds_nothing_up(grad_output: np.ndarray, *others: Any, stride: Pair, **_: Any) -> bool:
    """Return whether a gradient of pooling is best left to the library in bfloat16: where windows do not overlap.

    Where they do, the library rounds the sum for a pixel after each of its windows.
    """
    window: Pair = others[-1]
    return places_fit(grad_output, window) and stride[0] >= window[0] and stride[1] >= window[1]


def places_fit(_: np.ndarray, window: Pair, **__: Any) -> bool:
    """Return whether maxima of bfloat16 may be left to the library: it mistakes places that are no bytes (3.2)."""
    return lib.computes_bfloat16() and window[0] * window[1] <= LARGEST_BYTE_WINDOW


def maxpool2d_forward(x: np.ndarray, window: Pair, *, stride: Pair, padding: Padding) -> tuple[np.ndarray, np.ndarray]:
    """See `hpcnn.ops.maxpool2d_forward`."""
    geometry = _Geometry(lib.POOL_MAX, x.shape, window, stride, padding, data_type(x))
    primitive = _forward(geometry)
    if primitive is None:
        return cpu.maxpool2d_forward(x, window, stride=stride, padding=padding)
    x, y, argmax = plain(x), empty(geometry.target, x.dtype), empty(geometry.target, geometry.place_type)
    primitive(address(x), address(y), address(argmax))
    return y, argmax


def maxpool2d_backward(
    grad_output: np.ndarray, argmax: np.ndarray, input_size: Pair, window: Pair, *, stride: Pair, padding: Padding
) -> np.ndarray:
    """See `hpcnn.ops.maxpool2d_backward`."""
    source = (grad_output.shape[0], *input_size, grad_output.shape[3])
    primitive = _backward(_Geometry(lib.POOL_MAX, source, window, stride, padding, data_type(grad_output)))
    if primitive is None:
        return cpu.maxpool2d_backward(grad_output, argmax, input_size, window, stride=stride, padding=padding)
    grad_output, argmax, grad_input = plain(grad_output), plain(argmax), empty(source, grad_output.dtype)
    primitive(address(grad_output), address(grad_input), address(argmax))
    return grad_input


def avgpool2d_forward(x: np.ndarray, window: Pair, *, stride: Pair, padding: Padding) -> np.ndarray:
    """See `hpcnn.ops.avgpool2d_forward`."""
    geometry = _Geometry(lib.POOL_AVERAGE, x.shape, window, stride, padding, data_type(x))
    primitive = _forward(geometry)
    if primitive is None:
        return cpu.avgpool2d_forward(x, window, stride=stride, padding=padding)
    x, y = plain(x), empty(geometry.target, x.dtype)
    primitive(address(x), address(y))
    return y


def avgpool2d_backward(
    grad_output: np.ndarray, input_size: Pair, window: Pair, *, stride: Pair, padding: Padding
) -> np.ndarray:
    """See `hpcnn.ops.avgpool2d_backward`."""
    source = (grad_output.shape[0], *input_size, grad_output.shape[3])
    primitive = _backward(_Geometry(lib.POOL_AVERAGE, source, window, stride, padding, data_type(grad_output)))
    if primitive is None:
        return cpu.avgpool2d_backward(grad_output, input_size, window, stride=stride, padding=padding)
    grad_output, grad_input = plain(grad_output), empty(source, grad_output.dtype)
    primitive(address(grad_output), address(grad_input))
    return grad_input


def global_avgpool_forward(x: np.ndarray) -> np.ndarray:
    """See `hpcnn.ops.global_avgpool_forward`."""
    N, H, W, C = x.shape
    return avgpool2d_forward(x, (H, W), stride=(H, W), padding=NO_PADDING).reshape(N, C)


def global_avgpool_backward(grad_output: np.ndarray, input_size: Pair) -> np.ndarray:
    """See `hpcnn.ops.global_avgpool_backward`."""
    pixel = grad_output.reshape(grad_output.shape[0], 1, 1, grad_output.shape[1])
    return avgpool2d_backward(pixel, input_size, input_size, stride=input_size, padding=NO_PADDING)


def mean_of_pixels(shape: Shape) -> Primitive | None:
    """Return what finds the mean over rows and columns of float32; each sample's has the same bits in any company."""
    size = (shape[1], shape[2])
    return _forward(_Geometry(lib.POOL_AVERAGE, shape, size, size, NO_PADDING, lib.F32))


@cached
def _forward(geometry: _Geometry) -> Primitive:
    """Return y from x, and the places of the maxima."""
    arguments = (lib.SRC, lib.DST, lib.WORKSPACE) if geometry.algorithm == lib.POOL_MAX else (lib.SRC, lib.DST)
    return Primitive(_describe_forward(geometry), arguments)


@cached
def _backward(geometry: _Geometry) -> Primitive:
    """Return dx from dy and the places of the maxima."""
    hint = _describe_forward(geometry)
    description = Description(
        f"pooling gradient {geometry}",
        "pooling_backward",
        geometry.algorithm,
        images(geometry.source, geometry.data_type),
        images(geometry.target, geometry.data_type),
        *_window(geometry),
        hint.handle,
        attributes(),
    )
    arguments = [lib.DIFF_DST, lib.DIFF_SRC, *([lib.WORKSPACE] if geometry.algorithm == lib.POOL_MAX else [])]
    return Primitive(description, arguments)


def _describe_forward(geometry: _Geometry) -> Description:
    """Return the description of a forward pass; the backward pass takes it as a hint."""
    return Description(
        f"pooling {geometry}",
        "pooling_forward",
        lib.FORWARD,
        geometry.algorithm,
        images(geometry.source, geometry.data_type),
        images(geometry.target, geometry.data_type),
        *_window(geometry),
        attributes(),
    )


def _window(geometry: _Geometry) -> tuple[Any, Any, Any, Any, Any]:
    """Return strides, window, dilations (0 is dense), and the padding before and after."""
    before, after = zip(*geometry.padding, strict=True)
    return extents(geometry.stride), extents(geometry.window), extents((0, 0)), extents(before), extents(after)
