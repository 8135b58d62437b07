"""Convolutions on Hopper's warp-group matrix units (`kernels/conv2d_wgmma.cu`): all passes in bf16, two in tf32.

A forward pass is a product of pixels with filters; so is an input gradient, of the pixels of `grad_output` with filters
turned round. Where the forward pass has strides, the pixels of the input fall into phases by their remainders, each of
which is a product with the taps that reach it.

Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows
and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Pair, Shape
from hpcnn.ops.cuda import filters, tensor_map, types
from hpcnn.ops.cuda.device import GIVEN, Launch, device, remembered
from hpcnn.ops.cuda.products import Candidate, Problem, scratch
from hpcnn.ops.cuda.wgmma_tiles import (
    PHASE_TILES,
    PIXEL_TILES,
    ROW,
    WEIGHT_TILES,
    Cut,
    Tile,
    clusters,
    even_cut,
    even_plans,
    offered,
    plans,
)
from hpcnn.ops.cuda.wgmma_walks import Walk, forward_walks, input_walks

ARCHITECTURE = 90
THREADS = 384
MAX_PIXELS = 2**31 - 512
MAX_CHANNELS = 2**22
"""Of weight gradients, whose kernels number 64 channels at a time in 16 bits."""
MOST_BY_PHASE = 4
"""Candidates of a launch a phase that are offered beside those of one launch."""


_PIXELS = ("rows", "height", "width", "stride_h", "stride_w", "corner_h", "corner_w")
_WINDOWS = ("taps_h", "taps_w", "step_h", "step_w", "first", "tap_h", "tap_w", "chunks")


def _struct(longs: tuple[str, ...], ints: tuple[str, ...]) -> np.dtype[Any]:
    return np.dtype([*((name, np.int64) for name in longs), *((name, np.int32) for name in ints)], align=True)


FORWARD = _struct(
    ("out_first", "out_split", "out_image", "out_row", "out_pixel"),
    (*_PIXELS, *_WINDOWS, "columns", "splits", "activation", "dense", "engine"),
)
WEIGHT = _struct(("out_split",), (*_PIXELS, "filters", "channels", "taps_w", "taps", "step_h", "step_w", "splits"))
MAX_PHASES = 4
PHASES = np.dtype([("phase", FORWARD, (MAX_PHASES,)), ("reached", np.int32), ("count", np.int32)], align=True)
"""`struct Forward`, `struct Weight` and `struct Phases` of the kernels."""
CUT = _struct((), Cut._fields)
SUM_THREADS = 256


def candidates(problem: Problem) -> list[Candidate]:
    """Return ways to compute a problem, the likely fastest first; none where the device or the copy engine cannot.

    Rows of channels must be multiples of 16 bytes.
    """
    g = problem.geometry
    if device().architecture != ARCHITECTURE or g.groups != 1 or problem.compute == "fp32":
        return []
    if max(g.n * g.h * g.w, g.n * g.p * g.q, g.k, g.c) > MAX_PIXELS:
        return []
    if problem.kind == "weight":
        return _weight_candidates(problem)
    walks = forward_walks(problem) if problem.kind == "forward" else input_walks(problem)
    summed, extent = (g.c, (g.h, g.w)) if problem.kind == "forward" else (g.k, (g.p, g.q))
    vector = 16 // problem.storage.itemsize
    if not walks or summed % vector or not all(walk.encodable(extent) for walk in walks):
        return []
    rows, columns, _ = problem.gemm
    steps = max(walk.taps[0] * walk.taps[1] for walk in walks) * _chunks(problem, summed)
    tiles = tuple(tile for tile in PIXEL_TILES if tile.plain or problem.compute == "bf16")
    splits = 1 if len(walks) > 1 else device().num_processors
    found = plans(tiles, (rows, columns), steps, splits, problem.storage.itemsize)
    chosen = offered([plan for plan in found if plan[0].plain or plan[1] == 1])
    by_phase = [candidate(problem, *plan) for plan in chosen]
    if not 2 <= len(walks) <= MAX_PHASES:
        return by_phase
    found = plans(PHASE_TILES, (rows, columns), steps, 1, problem.storage.itemsize)
    at_once = [phased(problem, tile) for tile, _ in found]
    return [*at_once, *by_phase[:MOST_BY_PHASE]]


def candidate(problem: Problem, tile: Tile, splits: int) -> Candidate:
    """Return a way to compute one of the problems that this module takes, in tiles and parts of one's choice.

    `splits` must not be more than the product has steps, and 1 for input gradients of convolutions with strides.
    """
    name = f"wgmma_{tile.name}" + (f"_split{splits}" if splits > 1 else "")
    if problem.kind == "weight":
        return Candidate(name, _WeightProduct(problem, forward_walks(problem)[0], tile, splits))
    walks = forward_walks(problem) if problem.kind == "forward" else input_walks(problem)
    return Candidate(name, _PixelProduct(problem, walks, tile, splits))


def phased(problem: Problem, tile: Tile) -> Candidate:
    """Return a way to compute an input gradient of 2 to 4 phases in one launch, in one of `PHASE_TILES`."""
    return Candidate(f"wgmma_phases_{tile.name}", _PhasedProduct(problem, input_walks(problem), tile))


def _weight_candidates(problem: Problem) -> list[Candidate]:
    g, walk = problem.geometry, forward_walks(problem)[0]
    if problem.compute != "bf16" or g.c % 8 or g.k % 8 or g.c > MAX_CHANNELS or not walk.encodable((g.h, g.w)):
        return []
    shape, steps = _weight_product(problem)
    found = plans(WEIGHT_TILES, shape, steps, device().num_processors, 4)
    return [
        *(candidate(problem, tile, n) for tile, n in offered(found)),
        *(even_candidate(problem, tile) for tile in even_plans(shape, steps)),
    ]


def even_candidate(problem: Problem, tile: Tile) -> Candidate:
    """Return a way to compute a weight gradient of which all clusters of blocks get equally many steps."""
    return Candidate(f"wgmma_{tile.name}_even", _EvenWeightProduct(problem, forward_walks(problem)[0], tile))


def _weight_product(problem: Problem) -> tuple[Pair, int]:
    """Return rows and columns of a weight gradient, in whole units of 64 channels, and steps along the pixels."""
    g = problem.geometry
    return (g.k, g.r * g.s * -(-g.c // 64) * 64), -(-g.n * g.p * g.q // 64)


def _chunks(problem: Problem, channels: int) -> int:
    """Return how many steps the channels of one tap take."""
    return -(-channels * problem.storage.itemsize // ROW)


class _PixelProduct:
    """Runs a forward pass or an input gradient; see `products` for the operands."""

    def __init__(self, problem: Problem, walks: list[Walk], tile: Tile, splits: int) -> None:
        self._problem, self._walks, self._tile, self._splits = problem, walks, tile, splits
        self._transposed = problem.kind == "input"
        self._multiply = {
            activation: [self._product(walk, number) for walk in walks]
            for activation, number in types.ACTIVATIONS.items()
            if splits == 1 or activation is None
        }

    def __call__(self, x: Array, weight: Array, bias: Array | None, y: Array, activation: str | None) -> None:
        turned = filters.converted(weight, self._problem.compute, self._transposed, temporary=True)
        if self._splits == 1:
            for multiply in self._multiply[activation]:
                multiply(x, turned, bias, y)
            return
        partial = scratch(self._splits * y.size)
        self._multiply[None][0](x, turned, None, partial)
        _sum(y.shape, y.dtype, self._splits, activation)(partial, bias, y)

    def _product(self, walk: Walk, activation: np.int32) -> Callable[[Array, Array, Array | None, Array], None]:
        """Return what multiplies the pixels of one walk, given images, filters, bias and output."""
        problem, tile = self._problem, self._tile
        columns = problem.gemm[1]
        fields = _fields(problem, walk, self._splits, activation)
        number = dict(zip(FORWARD.names or (), fields))
        items = tile.items(number["rows"], columns) * self._splits
        split = self._splits > 1 and problem.compute == "bf16"
        kernel = f"conv2d_{'partial' if split else 'forward'}_wgmma_{tile.name}_{problem.compute}"
        # Whether the copy engine stores the output depends on where that lies.
        launches = [
            _prepare(kernel, tile, items, *[GIVEN] * 5, np.array((*fields, engine and number["dense"]), FORWARD))
            for engine in (False, True)
        ]
        pixels = tensor_map.ByAddress(lambda x: _pixels(problem, walk, tile, x))
        turned_map = tensor_map.ByAddress(lambda turned: _filters(problem, tile, turned))
        outputs = tensor_map.ByAddress(
            lambda y: tensor_map.tiled(y, (columns, y.size // columns), (ROW // y.itemsize, 64))
        )

        def multiply(x: Array, turned: Array, bias: Array | None, y: Array) -> None:
            filter_map, engine = turned_map(turned), tensor_map.storable(y, columns)
            launches[engine](pixels(x), filter_map, outputs(y) if engine else filter_map, bias, y)

        return multiply


class _PhasedProduct:
    """Runs an input gradient of several phases in one launch; see `products` for the operands."""

    def __init__(self, problem: Problem, walks: list[Walk], tile: Tile) -> None:
        self._problem, self._walks, self._tile = problem, walks, tile
        walks = sorted(walks, key=lambda walk: -prod(walk.taps))
        reached = [walk for walk in walks if prod(walk.taps)]
        phases = np.zeros((), PHASES)
        phases["reached"], phases["count"] = len(reached), len(walks)
        for i, walk in enumerate(walks):
            phases["phase"][i] = (*_fields(problem, walk, 1, types.ACTIVATIONS[None]), False)
        items = sum(tile.items(int(phase["rows"]), problem.gemm[1]) for phase in phases["phase"][: len(walks)])
        kernel = f"conv2d_phases_wgmma_{tile.name}_{problem.compute}"
        self._launch = _prepare(kernel, tile, items, GIVEN, GIVEN, GIVEN, phases, source="conv2d_wgmma_phases")
        self._pixels = tensor_map.ByAddress(
            lambda x: tensor_map.together([_pixels(problem, walk, tile, x) for walk in reached], MAX_PHASES)
        )
        self._filters = tensor_map.ByAddress(lambda turned: _filters(problem, tile, turned))

    def __call__(self, x: Array, weight: Array, bias: Array | None, y: Array, activation: str | None) -> None:
        if bias is not None or activation is not None:  # of fully connected layers, which have no strides
            _PixelProduct(self._problem, self._walks, PHASE_TILES[0], 1)(x, weight, bias, y, activation)
            return
        turned = filters.converted(weight, self._problem.compute, True, temporary=True)
        self._launch(self._pixels(x), self._filters(turned), y)


def _operands(problem: Problem) -> tuple[Pair, int, int]:
    """Return the extent of the images that are read, their channels, and the elements that are written."""
    g = problem.geometry
    if problem.kind == "forward":
        return (g.h, g.w), g.c, g.n * g.p * g.q * g.k
    return (g.p, g.q), g.k, g.n * g.h * g.w * g.c


def _fields(problem: Problem, walk: Walk, splits: int, activation: np.int32) -> tuple[Any, ...]:
    """Return the fields of `FORWARD` but for the last, "engine"."""
    _, channels, elements = _operands(problem)
    n = problem.geometry.n
    rows = n * walk.grid[0] * walk.grid[1]
    dense = walk.out_row == walk.grid[1] * walk.out_pixel and elements == rows * walk.out_pixel
    return (
        *(walk.out_first, elements, elements // n, walk.out_row, walk.out_pixel),
        *(rows, *walk.grid, *walk.stride, *walk.corner),
        *(*walk.taps, *walk.step, walk.first, *walk.tap, _chunks(problem, channels)),
        *(problem.gemm[1], splits, activation, dense),
    )


def _pixels(problem: Problem, walk: Walk, tile: Tile, x: Array) -> np.ndarray:
    """Return a map of the images as one walk meets them."""
    return tensor_map.im2col(x, tile.box, walk.corner, walk.upper(_operands(problem)[0]), walk.stride)


def _filters(problem: Problem, tile: Tile, turned: Array) -> np.ndarray:
    """Return a map of the filters, (column, tap, channel)."""
    g, width = problem.geometry, ROW // problem.storage.itemsize
    extents = _operands(problem)[1], g.r * g.s, problem.gemm[1]
    return tensor_map.tiled(turned, extents, (width, 1, tile.columns // tile.down))


class _WeightProduct:
    """Runs a weight gradient; see `products` for the operands."""

    def __init__(self, problem: Problem, walk: Walk, tile: Tile, splits: int) -> None:
        self._splits = splits
        g, taps = problem.geometry, walk.taps[0] * walk.taps[1]
        rows = g.n * g.p * g.q
        fields = (
            *(g.k * taps * g.c, rows, *walk.grid, *walk.stride, *walk.corner),
            *(g.k, g.c, walk.taps[1], taps, *walk.step, splits),
        )
        items = tile.items(g.k, taps * -(-g.c // 64) * 64) * splits
        self._numbers = np.array(fields, WEIGHT)
        kernel = f"conv2d_weight_wgmma_{tile.name}_bf16"
        self._launch = _prepare(kernel, tile, items, GIVEN, GIVEN, GIVEN, self._numbers)
        upper = walk.upper((g.h, g.w))
        self._pixels = tensor_map.ByAddress(lambda x: tensor_map.im2col(x, 64, walk.corner, upper, walk.stride))
        self._grads = tensor_map.ByAddress(lambda grad: tensor_map.tiled(grad, (g.k, rows), (64, 64)))

    def __call__(self, x: Array, grad_output: Array, grad_weight: Array) -> None:
        out = grad_weight if self._splits == 1 else scratch(self._splits * grad_weight.size)
        self._launch(self._pixels(x), self._grads(grad_output), out)
        if self._splits > 1:
            _sum(grad_weight.shape, grad_weight.dtype, self._splits, None)(out, None, grad_weight)


class _EvenWeightProduct(_WeightProduct):
    """The same in equal shares: tiles that no cut goes through are stored, partial sums of the others added."""

    def __init__(self, problem: Problem, walk: Walk, tile: Tile) -> None:
        super().__init__(problem, walk, tile, 1)
        cut = even_cut(tile, *_weight_product(problem))
        numbers, area = np.array(cut, CUT), tile.rows * tile.columns
        self._partial = 2 * cut.clusters * tile.cluster * area if cut.cuts_tiles else 0
        source, grid = "conv2d_wgmma_even", (cut.clusters * tile.cluster,)
        self._launch = device().prepare(
            *(source, f"conv2d_even_wgmma_{tile.name}_bf16", grid, (THREADS,)),
            *(GIVEN, GIVEN, GIVEN, GIVEN, self._numbers, numbers),
            shared_bytes=tile.shared_bytes,
        )
        grid = (min(cut.tiles * tile.cluster * (area * cut.lanes // 4 // SUM_THREADS), 8 * device().num_processors),)
        self._sum = device().prepare(
            *(source, f"conv2d_even_sum_wgmma_{tile.name}_bf16", grid, (SUM_THREADS,)),
            *(GIVEN, GIVEN, self._numbers, numbers, np.int32(cut.lanes)),
        )

    def __call__(self, x: Array, grad_output: Array, grad_weight: Array) -> None:
        partial = scratch(self._partial) if self._partial else None
        self._launch(self._pixels(x), self._grads(grad_output), partial, grad_weight)
        if partial is not None:
            self._sum(partial, grad_weight)


def _prepare(kernel: str, tile: Tile, items: int, *args: Any, source: str | None = None) -> Launch:
    """Return a kernel whose clusters of blocks, one block a processor, share out `items` tiles of clusters."""
    blocks = min(items, clusters(tile)) * tile.cluster
    source = source or tile.source
    return device().prepare(source, kernel, (blocks,), (THREADS,), *args, shared_bytes=tile.shared_bytes)


@remembered
def _sum(shape: Shape, dtype: Any, splits: int, activation: str | None) -> Launch:
    """Return the kernel that adds up the parts of a split product."""
    size = prod(shape)
    blocks = min(-(-size // 256), 16 * device().num_processors)
    numbers = np.int64(size), np.int32(splits), np.int32(shape[-1]), types.ACTIVATIONS[activation]
    kernel = f"conv2d_sum_wgmma_{types.suffix(dtype)}"
    return device().prepare("conv2d_wgmma", kernel, (blocks,), (256,), GIVEN, GIVEN, GIVEN, *numbers)
