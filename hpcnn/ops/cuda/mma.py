"""Convolutions on tensor cores by warp-wide products (mma.sync), for every GPU from sm_80 on: tiles, splits, launches.

Forward and input gradient are one kernel, `conv2d_mma_forward`: each output sums filter taps times pixels of a source
that lie an arithmetic progression apart. `gather` states them so. The gradient of the filters is `conv2d_mma_weight`.

Kernels copy vectors of 16 bytes; channels that do not fill them are padded with zeros in a copy of the images, or are
served by tiles with a narrower copy. Where there are fewer tiles than multiprocessors, the reduction is split, and
`conv2d_mma_reduce` adds the partial sums in order, so that results do not depend on chance.

Method: Chetlur et al., cuDNN: efficient primitives for deep learning, arXiv:1410.0759 (implicit GEMM).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil, gcd, prod
from typing import Any, NamedTuple

import numpy as np

from hpcnn.arrays import Array
from hpcnn.ops.cuda import filters, types
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.products import Candidate, Geometry, Problem, scratch

THREADS = 256
"""Of a block of the kernels around the products."""

MAX_PHASES = 8
MAX_SPLITS = 256
MAX_OFFERS = 8
INT32 = 2**31
SMALL_SHARED = {86: 99 << 10, 89: 99 << 10, 120: 99 << 10, 121: 99 << 10}
"""Bytes of shared memory that a block may have where that is less than on sm_80."""

AXIS = np.dtype(
    [(name, np.int32) for name in ("source", "outputs", "filter", "phases", "step", "tap_step", "filter_step")]
    + [(name, np.int32, (MAX_PHASES,)) for name in ("first", "taps", "filter_first")]
)
"""`struct Axis` of `kernels/conv2d_mma_forward.cu`."""

GATHER = np.dtype(
    [(name, np.int32) for name in ("count", "channels", "filters", "splits")] + [("rows", AXIS), ("columns", AXIS)]
)
"""`struct Gather` of `kernels/conv2d_mma_forward.cu`."""


class Tile(NamedTuple):
    """A kernel by the part of the product that one block computes.

    Attributes
    ----------
    name : str
        In the kernel's name.
    tall, wide : int
        Rows and columns.
    depth : int
        Bytes of the reduction that a stage holds: of a row of both operands.
    stages : int
        Slabs in shared memory.
    threads : int
        Of a block.
    copy : int
        Bytes that are copied at a time.
    speed : float
        Part of the best tile's speed, once it fills the device; an estimate.
    """

    name: str
    tall: int
    wide: int
    depth: int
    stages: int
    threads: int
    speed: float
    copy: int = 16

    @property
    def slab_bytes(self) -> int:
        """Bytes of one stage."""
        return (self.tall + self.wide) * self.depth


FORWARD_TILES = (
    Tile("256x128", 256, 128, 64, 4, 256, 1.0),
    Tile("128x128", 128, 128, 64, 4, 128, 0.95),
    Tile("128x128_deep", 128, 128, 128, 3, 256, 0.95),
    Tile("256x64", 256, 64, 64, 3, 256, 0.8),
    Tile("128x64", 128, 64, 64, 4, 128, 0.75),
    Tile("64x64", 64, 64, 128, 3, 128, 0.6),
)
NARROW_FORWARD = {
    "bf16": Tile("128x64_narrow", 128, 64, 64, 4, 128, 0.5, copy=8),
    "tf32": Tile("128x64_narrow", 128, 64, 64, 4, 128, 0.5, copy=4),
}
WEIGHT_TILES = (
    Tile("256x128", 256, 128, 64, 4, 256, 1.0),
    Tile("128x128", 128, 128, 64, 4, 128, 0.95),
    Tile("64x128", 64, 128, 64, 4, 128, 0.75),
    Tile("64x64", 64, 64, 128, 3, 128, 0.6),
)
NARROW_WEIGHT = {
    "bf16": Tile("64x64_narrow", 64, 64, 64, 4, 128, 0.5, copy=8),
    "tf32": Tile("64x64_narrow", 64, 64, 64, 4, 128, 0.5, copy=4),
}


def candidates(problem: Problem) -> list[Candidate]:
    """Return tiles and splits for a problem, the likely fastest first; none where another kernel must serve."""
    if not supported(problem):
        return []
    ways = [(tile, splits) for tile in tiles(problem) for splits in _splits(problem, tile)]
    ways.sort(key=lambda way: _seconds(problem, *way))
    return [candidate(problem, *way) for way in ways[:MAX_OFFERS]]


def supported(problem: Problem) -> bool:
    """Return whether these kernels compute a problem: its type, and whether its indices fit into 32 bits."""
    g = problem.geometry
    if problem.compute == "fp32" or g.groups != 1 or device().architecture < 80:
        return False
    channels, filter_count = (_round_up(extent, 8) for extent in (g.c, g.k))
    image = max(g.h * g.w * channels, g.p * g.q * filter_count)
    smallest = g.p * g.q if problem.kind == "forward" else max(1, g.h // g.stride_h) * max(1, g.w // g.stride_w)
    images_of_tile = 256 // smallest + 2
    small = (image * images_of_tile, filter_count * g.r * g.s * channels, g.n * g.h * g.w, g.n * g.p * g.q + 256)
    phases = max(g.stride_h, g.stride_w) if problem.kind == "input" else 1
    return max(small) < INT32 and phases <= MAX_PHASES


def tiles(problem: Problem) -> list[Tile]:
    """Return the tiles for a problem: the narrow one only where channels do not fill vectors of 16 bytes."""
    weight = problem.kind == "weight"
    offered = list(WEIGHT_TILES if weight else FORWARD_TILES)
    channels = problem.geometry.k if problem.kind == "input" else problem.geometry.c
    if channels % _vector(problem):
        offered.append((NARROW_WEIGHT if weight else NARROW_FORWARD)[problem.compute])
    limit = SMALL_SHARED.get(device().architecture, INT32)
    return [tile for tile in offered if _shared_bytes(problem, tile) <= limit]


def candidate(problem: Problem, tile: Tile, splits: int) -> Candidate:
    """Return the computation of a problem by a tile, the reduction in `splits` parts."""
    name = f"mma {tile.name}" + (f" split {splits}" if splits > 1 else "")
    run: Callable[..., None] = _weight if problem.kind == "weight" else _gather
    return Candidate(name, partial(run, problem, tile, splits))


def gather(g: Geometry, kind: str, *, channels: int, splits: int = 1) -> np.ndarray:
    """Return a `struct Gather`: which pixels and taps each output of a pass sums.

    Parameters
    ----------
    g : Geometry
        Of the forward convolution.
    kind : {"forward", "input"}
        The pass; the filters of "input" are transposed and turned round, as `filters.converted` does it.
    channels : int
        Of the source in memory, padding included.
    splits : int
        Parts of the reduction.
    """
    axis = _forward_axis if kind == "forward" else _input_axis
    rows = axis(g.h, g.p, g.r, g.stride_h, g.pad_top, g.dilation_h)
    columns = axis(g.w, g.q, g.s, g.stride_w, g.pad_left, g.dilation_w)
    return np.array((g.n, channels, g.k if kind == "forward" else g.c, splits, rows, columns), GATHER)


def _forward_axis(size: int, outputs: int, kernel: int, stride: int, before: int, dilation: int) -> tuple[Any, ...]:
    """Return a `struct Axis` of the forward pass: one phase."""
    phases = [(-before, kernel, 0)]
    return (size, outputs, kernel, 1, stride, dilation, 1, *_columns(phases))


def _input_axis(size: int, outputs: int, kernel: int, stride: int, before: int, dilation: int) -> tuple[Any, ...]:
    """Return a `struct Axis` of the input gradient: a phase for every remainder of an input index modulo the stride.

    Input index h gathers from output (h + before - r * dilation) / stride, for the taps r for which that is whole:
    every (stride / gcd(stride, dilation))-th one, or none. Taps are counted from the last: filters are turned round.
    """
    every = stride // gcd(stride, dilation)
    tap_step = every * dilation // stride
    phases = []
    for phase in range(min(stride, MAX_PHASES)):
        first = next((r for r in range(every) if (phase + before - r * dilation) % stride == 0), kernel)
        taps = max(0, ceil((kernel - first) / every))
        last = first + (taps - 1) * every
        phases.append(((phase + before - last * dilation) // stride, taps, kernel - 1 - last) if taps else (0, 0, 0))
    return (outputs, size, kernel, stride, 1, tap_step, every, *_columns(phases))


def _columns(phases: list[tuple[int, int, int]]) -> list[tuple[int, ...]]:
    """Return first, taps and filter_first of all phases, up to MAX_PHASES of each."""
    filled = phases + [(0, 0, 0)] * (MAX_PHASES - len(phases))
    return [tuple(column) for column in zip(*filled, strict=True)]


def _gather(
    problem: Problem,
    tile: Tile,
    splits: int,
    source: Array,
    weight: Array,
    bias: Array | None,
    out: Array,
    activation: str | None,
) -> None:
    """Launch `conv2d_mma_forward`, and the sum of its parts; operands as `products` has them for both its kinds."""
    images = _padded(source, tile, problem)
    turned = filters.converted(weight, problem.compute, problem.kind == "input", align=images.shape[3])
    struct = gather(problem.geometry, problem.kind, channels=images.shape[3], splits=splits)
    number = types.ACTIVATIONS[activation]
    partials = scratch(splits * out.size) if splits > 1 else None
    device().launch(
        "conv2d_mma_forward",
        f"conv2d_forward_mma_{tile.name}_{problem.compute}",
        (_blocks(problem, tile), 1, _phases(problem) * splits),
        (tile.threads,),
        *(images, turned, bias, out, partials, struct, number),
        shared_bytes=_shared_bytes(problem, tile),
    )
    if partials is not None:
        _reduce(partials, bias, out, splits, number)


def _weight(problem: Problem, tile: Tile, splits: int, x: Array, grad_output: Array, grad_weight: Array) -> None:
    """Launch `conv2d_mma_weight`, and the sum of its parts; operands as `products` has them."""
    g = problem.geometry
    images = _padded(x, tile, problem)
    grad = _padded(grad_output, WEIGHT_TILES[0], problem)
    struct = np.array(tuple(g._replace(c=images.shape[3], k=grad.shape[3])), types.CONV2D)
    partials = scratch(splits * grad_weight.size) if splits > 1 else None
    device().launch(
        "conv2d_mma_weight",
        f"conv2d_weight_mma_{tile.name}_{problem.compute}",
        (_blocks(problem, tile), 1, splits),
        (tile.threads,),
        *(images, grad, grad_weight if partials is None else partials, struct, np.int32(g.k), np.int32(g.c)),
        shared_bytes=_shared_bytes(problem, tile),
    )
    if partials is not None:
        _reduce(partials, None, grad_weight, splits, types.ACTIVATIONS[None])


def _reduce(partials: Array, bias: Array | None, out: Array, splits: int, activation: np.int32) -> None:
    """Add partial sums in order, then the bias, and apply the activation."""
    device().launch(
        "conv2d_mma_around",
        f"conv2d_mma_reduce_{types.suffix(out.dtype)}",
        (-(-out.size // THREADS),),
        (THREADS,),
        *(partials, bias, out, np.int64(out.size), np.int32(splits), np.int32(out.shape[-1]), activation),
    )


def _padded(x: Array, tile: Tile, problem: Problem) -> Array:
    """Return images whose channels fill what a tile copies at a time; a copy with zeros where they do not."""
    channels = x.shape[3]
    wide = _round_up(channels, tile.copy // problem.storage.itemsize)
    if wide == channels:
        return x
    out = device().empty((*x.shape[:3], wide), x.dtype)
    device().launch(
        "conv2d_mma_around",
        f"conv2d_mma_pad_{types.suffix(x.dtype)}",
        (-(-out.size // THREADS),),
        (THREADS,),
        *(x, out, np.int64(prod(x.shape[:3])), np.int32(channels), np.int32(wide)),
    )
    return out


def _extents(problem: Problem, tile: Tile) -> tuple[int, int, int]:
    """Return rows and columns of the product of one phase, and the depth in stages of all phases, on average."""
    g, size = problem.geometry, problem.storage.itemsize
    channels, phases = _round_up(g.c, tile.copy // size), _phases(problem)
    if problem.kind == "weight":
        return g.k, g.r * g.s * channels, ceil(g.n * g.p * g.q * size / tile.depth)
    if problem.kind == "forward":
        return g.n * g.p * g.q, g.k, ceil(g.r * g.s * channels * size / tile.depth)
    rows = g.n * ceil(g.h / g.stride_h) * ceil(g.w / g.stride_w)
    return rows, g.c, ceil(g.r * g.s * _round_up(g.k, tile.copy // size) * size / tile.depth / phases)


def _shared_bytes(problem: Problem, tile: Tile) -> int:
    """Return the shared memory of a block: the stages, and where rows (or columns) of the product are in memory."""
    return tile.stages * tile.slab_bytes + (tile.wide * 4 if problem.kind == "weight" else tile.tall * 8)


def _blocks(problem: Problem, tile: Tile) -> int:
    """Return the number of tiles of the product (of one phase)."""
    rows, columns, _ = _extents(problem, tile)
    return ceil(rows / tile.tall) * ceil(columns / tile.wide)


def _phases(problem: Problem) -> int:
    """Return into how many products a pass falls."""
    return problem.geometry.stride_h * problem.geometry.stride_w if problem.kind == "input" else 1


def _splits(problem: Problem, tile: Tile) -> list[int]:
    """Return numbers of parts worth trying: one, and what fills the multiprocessors once, twice or four times."""
    blocks, depth = _blocks(problem, tile) * _phases(problem), _extents(problem, tile)[2]
    filling = {times * device().num_processors // blocks for times in (1, 2, 4)}
    return sorted({1} | {splits for splits in filling if 1 < splits <= min(MAX_SPLITS, depth // 4)})


def _seconds(problem: Problem, tile: Tile, splits: int) -> float:
    """Return a rough duration, to put candidates in order: the busiest multiprocessor, and the sum of the parts."""
    rows, columns, depth = _extents(problem, tile)
    blocks = _blocks(problem, tile) * _phases(problem) * splits
    rate = 3e12 * tile.speed / (1 if problem.compute == "bf16" else 2)  # flops of a multiprocessor
    lone = 0.6 if blocks <= device().num_processors and tile.threads < 256 else 1.0  # few warps hide little latency
    flops = 2 * tile.tall * tile.wide * depth * tile.depth / problem.storage.itemsize
    busiest = ceil(blocks / device().num_processors) * flops / splits / (rate * lone)
    return busiest + (5e-6 + rows * columns * _phases(problem) * splits * 8 / 2e12 if splits > 1 else 0.0)


def _vector(problem: Problem) -> int:
    """Return how many elements 16 bytes hold."""
    return 16 // problem.storage.itemsize


def _round_up(count: int, multiple: int) -> int:
    """Return the first multiple that is not below `count`."""
    return -(-count // multiple) * multiple
