"""Pooling in NumPy: one pass over each place (r, s) of the window, for a few samples at a time.

Legend: N samples, H W input rows and columns, C channels, R S window rows and columns, P Q output rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import numpy as np

from hpcnn.arrays import Padding, Pair, empty
from hpcnn.geometry import output_size
from hpcnn.ops.cpu.blocks import row_blocks

LARGEST_BYTE_WINDOW = 255
"""Windows of at most so many places have their argmax in bytes."""


class _Tap(NamedTuple):
    """One place r * S + s of the window: which outputs have a pixel there, and which pixels those are."""

    place: int
    outputs: tuple[slice, slice, slice]
    pixels: tuple[slice, slice, slice]


def maxpool2d_forward(x: np.ndarray, window: Pair, *, stride: Pair, padding: Padding) -> tuple[np.ndarray, np.ndarray]:
    """See `hpcnn.ops.maxpool2d_forward`."""
    size = output_size(x.shape[1:3], window, stride, padding)
    shape = (x.shape[0], *size, x.shape[3])
    y, argmax = empty(shape, x.dtype), empty(shape, np.uint8 if prod(window) <= LARGEST_BYTE_WINDOW else np.int32)
    taps = list(_taps(x.shape[1:3], size, window, stride, padding))
    first_places = _first_places(size, window, stride, padding)
    for block in row_blocks(shape[0], prod(shape[1:])):
        images, best, where = x[block], y[block], argmax[block]
        best.fill(-np.inf)
        where[...] = first_places
        for tap in taps:
            pixels, so_far = images[tap.pixels], best[tap.outputs]
            # Places only grow, so the largest that beat its forerunners is the first maximum.
            np.maximum(where[tap.outputs], (pixels > so_far) * where.dtype.type(tap.place), out=where[tap.outputs])
            np.maximum(pixels, so_far, out=so_far)  # which lets a NaN through, to be seen in the loss
    return y, argmax


def maxpool2d_backward(
    grad_output: np.ndarray, argmax: np.ndarray, input_size: Pair, window: Pair, *, stride: Pair, padding: Padding
) -> np.ndarray:
    """See `hpcnn.ops.maxpool2d_backward`."""
    size, channels = grad_output.shape[1:3], grad_output.shape[3]
    grad_input = empty((len(grad_output), *input_size, channels), grad_output.dtype)
    taps = list(_taps(input_size, size, window, stride, padding))
    for block in row_blocks(len(grad_input), prod(grad_input.shape[1:])):
        grad, where, target = grad_output[block], argmax[block], grad_input[block]
        target.fill(0)
        for tap in taps:
            target[tap.pixels] += grad[tap.outputs] * (where[tap.outputs] == tap.place)
    return grad_input


def avgpool2d_forward(x: np.ndarray, window: Pair, *, stride: Pair, padding: Padding) -> np.ndarray:
    """See `hpcnn.ops.avgpool2d_forward`."""
    size = output_size(x.shape[1:3], window, stride, padding)
    y = empty((x.shape[0], *size, x.shape[3]), x.dtype)
    taps = list(_taps(x.shape[1:3], size, window, stride, padding))
    for block in row_blocks(len(y), prod(y.shape[1:])):
        images, sums = x[block], y[block]
        sums.fill(0)
        for tap in taps:
            sums[tap.outputs] += images[tap.pixels]
        sums *= x.dtype.type(1.0 / prod(window))
    return y


def avgpool2d_backward(
    grad_output: np.ndarray, input_size: Pair, window: Pair, *, stride: Pair, padding: Padding
) -> np.ndarray:
    """See `hpcnn.ops.avgpool2d_backward`."""
    size, channels = grad_output.shape[1:3], grad_output.shape[3]
    grad_input = empty((len(grad_output), *input_size, channels), grad_output.dtype)
    share = grad_output.dtype.type(1.0 / prod(window))
    taps = list(_taps(input_size, size, window, stride, padding))
    for block in row_blocks(len(grad_input), prod(grad_input.shape[1:])):
        grad, target = grad_output[block] * share, grad_input[block]
        target.fill(0)
        for tap in taps:
            target[tap.pixels] += grad[tap.outputs]
    return grad_input


def global_avgpool_forward(x: np.ndarray) -> np.ndarray:
    """See `hpcnn.ops.global_avgpool_forward`."""
    y = empty((x.shape[0], x.shape[3]), x.dtype)
    y[...] = np.mean(x, axis=(1, 2), dtype=np.float64)
    return y


def global_avgpool_backward(grad_output: np.ndarray, input_size: Pair) -> np.ndarray:
    """See `hpcnn.ops.global_avgpool_backward`."""
    grad_input = empty((grad_output.shape[0], *input_size, grad_output.shape[1]), grad_output.dtype)
    grad_input[...] = (grad_output * grad_output.dtype.type(1.0 / prod(input_size)))[:, None, None]
    return grad_input


def _taps(input_size: Pair, size: Pair, window: Pair, stride: Pair, padding: Padding) -> Iterator[_Tap]:
    """Yield the places of the window in order, without those that only ever see padding."""
    everyone = slice(None)
    for r in range(window[0]):
        rows = _seen(input_size[0], size[0], r, stride[0], padding[0][0])
        for s in range(window[1]):
            columns = _seen(input_size[1], size[1], s, stride[1], padding[1][0])
            if rows and columns:
                yield _Tap(r * window[1] + s, (everyone, rows[0], columns[0]), (everyone, rows[1], columns[1]))


def _seen(extent: int, count: int, place: int, stride: int, before: int) -> tuple[slice, slice] | None:
    """Return, along one axis, the outputs that see a pixel at `place` of their window, and those pixels."""
    first = max(0, -((place - before) // stride))  # rounds up
    stop = min(count, (extent - 1 + before - place) // stride + 1)
    if first >= stop:
        return None
    pixel = first * stride + place - before
    return slice(first, stop), slice(pixel, pixel + (stop - first - 1) * stride + 1, stride)


def _first_places(size: Pair, window: Pair, stride: Pair, padding: Padding) -> np.ndarray:
    """Return, for each output (P, Q, 1), the first place of its window that is a pixel."""
    rows, columns = (
        np.maximum(0, before - step * np.arange(count))
        for count, step, (before, _) in zip(size, stride, padding, strict=True)
    )
    return (rows[:, None] * window[1] + columns)[:, :, None]
