"""Convolutions in float32 on the ordinary cores: exact, of any geometry; see `kernels/conv2d_simt.cu`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np

from hpcnn.arrays import Array
from hpcnn.ops.cuda import types
from hpcnn.ops.cuda.columns import reduce_partials
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.products import Candidate, Geometry, Problem, scratch

TILES = ((128, 128), (128, 64), (64, 64))
"""Tiles of the output that kernels of float32 come in; of other types, and without vectors, only the last."""

LEAST_DEPTH = 128
"""A block that takes fewer steps of depth than this spends its time on its ends."""

LARGEST_SPLIT = 128

PRODUCT = np.dtype(
    [
        (name, np.int32)
        for name in (
            *("samples", "rows", "columns", "height", "width", "channels", "part", "other_channels", "other_part"),
            *("taps_r", "taps_s", "first_r", "first_s", "every_r", "every_s", "filter_r", "filter_s"),
            *("scale_h", "scale_w", "start_h", "start_w", "step_h", "step_w"),
            *("out_height", "out_width", "origin_h", "origin_w", "spread_h", "spread_w", "splits"),
        )
    ]
)
"""`struct Product` of `kernels/conv2d_factors.cuh`."""


class _Axis(NamedTuple):
    """Places, pixels and taps along one axis: place i reads pixel start + i scale + j step at its j-th tap.

    It is output pixel origin + i spread; its j-th tap is that of the filter at first + j every.
    """

    extent: int
    taps: int
    first: int = 0
    every: int = 1
    scale: int = 1
    start: int = 0
    step: int = 1
    origin: int = 0
    spread: int = 1


class _Launch(NamedTuple):
    """One launch of a problem; only the input pass of a strided convolution has several."""

    numbers: tuple[int, ...]
    rows: int
    columns: int
    depth: int

    def product(self, splits: int) -> np.ndarray:
        """Return the `struct Product` of this launch."""
        return np.array((*self.numbers, splits), PRODUCT)


def candidates(problem: Problem) -> list[Candidate]:
    """Return a candidate for each tile, the one that wastes and waits least first."""
    g = problem.geometry
    filters, channels = g.k // g.groups, g.c // g.groups
    read = {"forward": (channels,), "input": (filters, channels), "weight": (filters, channels)}[problem.kind]
    width = 4 if all(extent % 4 == 0 for extent in read) else 1
    launches = list(_launches(problem.kind, _flat(g)))
    tiles = list(TILES if width == 4 and problem.compute != "bf16" else TILES[-1:])
    tiles = sorted(tiles, key=partial(_cost, launches, g.groups))
    if problem.compute != "fp32":
        tiles = tiles[:1]  # tensor cores will be faster
    return [_candidate(problem, launches, tile, width) for tile in tiles]


def _candidate(problem: Problem, launches: list[_Launch], tile: tuple[int, int], width: int) -> Candidate:
    """Return the kernel of one tile and vector width."""
    shape = f"{tile[0]}x{tile[1]}"
    kernel = f"conv2d_{problem.kind}_simt_{shape}_v{width}_{types.suffix(problem.storage)}"
    splits = max(_splits(launch, tile, problem.geometry.groups) for launch in launches)

    block = (tile[0] * tile[1] // 64,)
    depth_of_grid = problem.geometry.groups * splits
    parts = [((_blocks(launch, tile), 1, depth_of_grid), launch.product(splits)) for launch in launches]

    def launch_all(*args: Any) -> None:
        for grid, product in parts:
            device().launch("conv2d_simt", kernel, grid, block, *args, product)

    def run(x: Array, weight: Array, bias: Array | None, y: Array, activation: str | None) -> None:
        partials = scratch(splits * prod(y.shape)) if splits > 1 else None
        launch_all(x, weight, bias, y, partials, types.ACTIVATIONS[activation])
        if partials is not None:
            reduce_partials(partials, splits, y, bias, activation)

    def run_weight(x: Array, grad_output: Array, grad_weight: Array) -> None:
        partials = scratch(splits * prod(grad_weight.shape)) if splits > 1 else None
        launch_all(x, grad_output, grad_weight, partials)
        if partials is not None:
            reduce_partials(partials, splits, grad_weight)

    return Candidate(f"simt {shape}", run_weight if problem.kind == "weight" else run)


def _blocks(launch: _Launch, tile: tuple[int, int]) -> int:
    """Return into how many tiles the output of a launch is cut."""
    return -(-launch.rows // tile[0]) * -(-launch.columns // tile[1])


def _slots(tile: tuple[int, int]) -> int:
    """Return how many blocks the device runs at a time: 512 threads of 8 x 8 outputs a multiprocessor."""
    return device().num_processors * 512 * 64 // (tile[0] * tile[1])


def _splits(launch: _Launch, tile: tuple[int, int], groups: int) -> int:
    """Return into how many parts to cut the depth so that all multiprocessors are full of blocks."""
    wanted = _slots(tile) // (_blocks(launch, tile) * groups)
    return max(1, min(wanted, launch.depth // LEAST_DEPTH, LARGEST_SPLIT))


def _cost(launches: list[_Launch], groups: int, tile: tuple[int, int]) -> float:
    """Return about how long a tile's kernel takes: rounds of blocks times what a block does.

    Small tiles read more for each product: they are charged for their rows and columns besides.
    """
    total = 0.0
    for launch in launches:
        splits = _splits(launch, tile, groups)
        blocks = _blocks(launch, tile) * groups * splits
        slots = _slots(tile)
        work = (tile[0] * tile[1] + 16 * (tile[0] + tile[1])) * (launch.depth / splits + 32)
        total += max(1.0, blocks / slots if blocks > 4 * slots else -(-blocks // slots)) * work * slots
    return total


def _flat(g: Geometry) -> Geometry:
    """Return a convolution of single pixels as one of a single long row: counting pixels is then cheap."""
    pointwise = (g.r, g.s, g.stride_h, g.stride_w, g.pad_top, g.pad_left, g.p, g.q) == (1, 1, 1, 1, 0, 0, g.h, g.w)
    pixels = g.n * g.h * g.w
    return g._replace(n=1, h=1, w=pixels, p=1, q=pixels) if pointwise and pixels < 1 << 31 else g


def _launches(kind: str, g: Geometry) -> Iterator[_Launch]:
    """Yield the launches of a pass."""
    if kind == "input":
        for down in _classes(g.h, g.r, g.stride_h, g.pad_top, g.dilation_h):
            for across in _classes(g.w, g.s, g.stride_w, g.pad_left, g.dilation_w):
                yield _launch(kind, g, down, across)
    else:
        down = _Axis(g.p, g.r, scale=g.stride_h, start=-g.pad_top, step=g.dilation_h)
        across = _Axis(g.q, g.s, scale=g.stride_w, start=-g.pad_left, step=g.dilation_w)
        yield _launch(kind, g, down, across)


def _classes(size: int, taps: int, stride: int, pad: int, dilation: int) -> Iterator[_Axis]:
    """Yield the classes of input pixels along an axis.

    Pixel h is read at tap r by output (h + pad - r dilation) / stride where that is whole. With h = origin + i stride,
    and the taps r = first + j every for which it is, output i + start - j step.
    """
    common = gcd(dilation, stride)
    every = stride // common
    for origin in range(min(stride, size)):
        first = next((r for r in range(min(every, taps)) if (origin + pad - r * dilation) % stride == 0), taps)
        yield _Axis(
            extent=-(-(size - origin) // stride),
            taps=-(-(taps - first) // every),
            first=first,
            every=every,
            start=(origin + pad - first * dilation) // stride,
            step=-(dilation // common),
            origin=origin,
            spread=stride,
        )


def _launch(kind: str, g: Geometry, down: _Axis, across: _Axis) -> _Launch:
    """Return one launch from its two axes."""
    images = (g.h, g.w, g.c), (g.p, g.q, g.k)
    read, other = images[::-1] if kind == "input" else images
    part, other_part = read[2] // g.groups, other[2] // g.groups
    numbers = (
        *(g.n, down.extent, across.extent, *read, part, other[2], other_part),
        *(down.taps, across.taps, down.first, across.first, down.every, across.every, g.r, g.s),
        *(down.scale, across.scale, down.start, across.start, down.step, across.step),
        *(other[0], other[1], down.origin, across.origin, down.spread, across.spread),
    )
    pixels, taps = g.n * down.extent * across.extent, down.taps * across.taps
    extents = (other_part, taps * part, pixels) if kind == "weight" else (pixels, other_part, taps * part)
    return _Launch(numbers, *extents)
