"""How products of `wgmma` walk over the pixels of images, and over those of gradients, phase by phase."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from hpcnn.arrays import Pair
from hpcnn.ops.cuda.products import Problem

CORNERS = range(-128, 128)
"""What the copy engine can encode of corners of the base pixels' box, of steps, and of a tap's distance."""
MAX_STRIDE, MAX_REACH = 8, 255


class Walk(NamedTuple):
    """Which pixels of an array a product visits, which filter taps go with them, and where the sums go.

    All pairs are (rows, columns). Base pixel (i, j) of an image is `corner` + (i, j) * `stride`; tap (i, j) reads the
    base pixel moved by (i, j) * `step` and the filters' tap `first` + i * `tap[0]` + j * `tap[1]`. Sums of pixel (i, j)
    go to element `out_first` + i * `out_row` + j * `out_pixel` of an image.
    """

    grid: Pair
    corner: Pair
    stride: Pair
    taps: Pair
    step: Pair
    first: int
    tap: Pair
    out_first: int
    out_row: int
    out_pixel: int

    def upper(self, extent: Pair) -> Pair:
        """Return where the last base pixel is, counted from the last pixel of an image of this extent."""
        h, w = (self.corner[i] + (self.grid[i] - 1) * self.stride[i] - (extent[i] - 1) for i in (0, 1))
        return h, w

    def encodable(self, extent: Pair) -> bool:
        """Return whether the copy engine can walk so over images of this extent."""
        corners = all(corner in CORNERS for corner in (*self.corner, *self.upper(extent)))
        reach = max((self.taps[i] - 1) * self.step[i] for i in (0, 1))
        return corners and reach <= MAX_REACH and max(self.stride) <= MAX_STRIDE


def forward_walks(problem: Problem) -> list[Walk]:
    """Return the one walk over the input that a forward pass, and a weight gradient, take."""
    g = problem.geometry
    return [
        Walk(
            grid=(g.p, g.q),
            corner=(-g.pad_top, -g.pad_left),
            stride=(g.stride_h, g.stride_w),
            taps=(g.r, g.s),
            step=(g.dilation_h, g.dilation_w),
            first=0,
            tap=(g.s, 1),
            out_first=0,
            out_row=g.q * g.k,
            out_pixel=g.k,
        )
    ]


def input_walks(problem: Problem) -> list[Walk]:
    """Return a walk over `grad_output` for each phase of the input; none where neither strides nor dilation are 1."""
    g = problem.geometry
    phases = [
        list(_phases(*axis))
        for axis in (
            (g.h, g.r, g.stride_h, g.pad_top, g.dilation_h),
            (g.w, g.s, g.stride_w, g.pad_left, g.dilation_w),
        )
    ]
    return [
        Walk(
            grid=(rows.extent, columns.extent),
            corner=(rows.corner, columns.corner),
            stride=(1, 1),
            taps=(rows.taps, columns.taps),
            step=(rows.step, columns.step),
            first=rows.first_tap * g.s + columns.first_tap,
            tap=(g.stride_h * g.s, g.stride_w),
            out_first=(rows.phase * g.w + columns.phase) * g.c,
            out_row=g.stride_h * g.w * g.c,
            out_pixel=g.stride_w * g.c,
        )
        for rows, columns in product(*phases)
    ]


class _Phase(NamedTuple):
    """Pixels phase, phase + stride, ... along one axis of the input, and the taps (reversed) that reach them."""

    phase: int
    extent: int
    corner: int
    first_tap: int
    taps: int
    step: int


def _phases(extent: int, taps: int, stride: int, padding: int, dilation: int) -> Iterator[_Phase]:
    """Yield the phases of an axis.

    Tap t, counted from the last, brings pixel x of the input p of the output where stride * p = x + padding - reach +
    t * dilation. With strides and dilation the taps of a phase may have any distance: nothing is yielded then.
    """
    if stride > 1 and dilation > 1:
        return
    reach = (taps - 1) * dilation
    for phase in range(min(stride, extent)):
        before = phase + padding - reach
        first = -before % stride
        yield _Phase(
            phase=phase,
            extent=-(-(extent - phase) // stride),
            corner=(before + first) // stride,
            first_tap=first,
            taps=max(0, -(-(taps - first) // stride)),
            step=dilation,
        )
