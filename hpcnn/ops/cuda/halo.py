"""Convolutions of stride 1 on Hopper that load each pixel once for all taps (`kernels/conv2d_halo.cu`): bf16 and tf32.

They serve forward passes and input gradients, of windows of more than one tap. Images lie in shared memory as padded
lines of `pitch` pixels that form one sequence of positions; a tap is a shift of the sequence. How the hardware reads an
operand that begins within a pattern of the swizzle is found by a small convolution, once for a device; where none of
the known ways gives the right numbers, nothing is offered.

Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows
and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcnn.arrays import Array
from hpcnn.ops.cuda import filters, tensor_map, types
from hpcnn.ops.cuda.device import GIVEN, device
from hpcnn.ops.cuda.products import Candidate, Compute, Geometry, Problem

SOURCE = "conv2d_halo"
ARCHITECTURE = 90
THREADS = 384
ROW = 128
"""Bytes of a pixel's channels that are summed in one step."""
HEAD_BYTES = 37 * 1024
"""Shared memory before the filters: stores and barriers."""
SHARED_BYTES = 227 * 1024
PATCHES, MAX_STAGES, MIN_STAGES, MAX_STRIPS = 2, 8, 3, 64
LEAD = True
"""Whether one group of a block stores while the other multiplies."""
MAX_POSITIONS = 2**31 - 1024
PATTERN = 8
"""Pixels after which the swizzle repeats."""
MAX_WASTE = 2.0
"""Positions for each pixel of the output that are still worth it."""

HALO = np.dtype(
    [
        (name, np.int32)
        for name in (
            *("positions", "pitch", "image_lines", "strips", "strip_width", "height", "width", "pad_top", "pad_left"),
            *("taps_h", "taps_w", "chunks", "columns", "activation", "patch_bytes", "stages", "based", "lead"),
        )
    ]
)
"""`struct Halo` of the kernels."""


class Tile(NamedTuple):
    """A block's part of a product: positions and filters; the rate is a guess of the share of peak speed.

    `turned`: filters are the left operand.
    """

    rows: int
    columns: int
    rate: float
    turned: bool = False

    @property
    def name(self) -> str:
        """How kernels name it."""
        return f"{self.rows}x{self.columns}" + ("_turned" if self.turned else "")


TILES = (
    Tile(256, 128, 1.0),
    Tile(512, 64, 0.95, True),
    Tile(384, 64, 0.9, True),
    Tile(384, 64, 0.8),
    Tile(256, 64, 0.75),
    Tile(128, 128, 0.85),
)
OFFERED = 4


class Layout(NamedTuple):
    """How operands lie: lines of any pitch or of whole patterns, and how a descriptor states the pattern's phase."""

    dense: bool
    based: bool


LAYOUTS = (Layout(True, False), Layout(True, True), Layout(False, False), Layout(False, True))
"""In the order in which they are tried."""

_layouts: dict[str, Layout | None] = {}


class Walk(NamedTuple):
    """A convolution of stride 1 over an array (images, height, width, channels); all pairs are (rows, columns)."""

    images: int
    extent: tuple[int, int]
    out: tuple[int, int]
    taps: tuple[int, int]
    before: tuple[int, int]
    channels: int
    columns: int

    @property
    def behind(self) -> tuple[int, int]:
        """Padding at the bottom and right."""
        h, w = (self.out[i] - self.extent[i] - self.before[i] + self.taps[i] - 1 for i in (0, 1))
        return h, w


class Plan(NamedTuple):
    """How padded lines lie in shared memory."""

    pitch: int
    image_lines: int
    strips: int
    strip_width: int
    positions: int
    patch_bytes: int
    stages: int

    def shared_bytes(self, tile: Tile) -> int:
        """Return what a block needs of dynamic shared memory."""
        return HEAD_BYTES + self.stages * tile.columns * ROW + PATCHES * self.patch_bytes


def candidates(problem: Problem) -> list[Candidate]:
    """Return ways to compute a problem, the likely fastest first; none where the device or the copy engine cannot.

    Rows of channels must be multiples of 16 bytes.
    """
    g = problem.geometry
    if device().architecture != ARCHITECTURE or problem.kind == "weight" or problem.compute == "fp32":
        return []
    strides = (g.stride_h, g.stride_w, g.dilation_h, g.dilation_w, g.groups)
    if strides != (1, 1, 1, 1, 1) or g.r * g.s == 1:
        return []
    walk = walk_of(problem)
    if walk.channels % (16 // problem.storage.itemsize) or min(*walk.before, *walk.behind) < 0:
        return []
    chosen = layout()
    if chosen is None:
        return []
    plans = [(tile, plan(walk, tile, chosen)) for tile in TILES]
    most = MAX_WASTE * walk.images * walk.out[0] * walk.out[1]
    costs = {tile: _cost(walk, tile, made) for tile, made in plans if made is not None and made.positions <= most}
    return [candidate(problem, tile, chosen) for tile in sorted(costs, key=lambda tile: costs[tile])[:OFFERED]]


def candidate(problem: Problem, tile: Tile, chosen: Layout) -> Candidate:
    """Return a way to compute one of the problems that this module takes, in a tile and a layout of one's choice."""
    return Candidate(f"halo_{tile.name}", _Product(problem, tile, chosen))


def walk_of(problem: Problem) -> Walk:
    """Return a forward pass as it is, and an input gradient as the convolution of `grad_output` that it is."""
    g = problem.geometry
    if problem.kind == "forward":
        return Walk(g.n, (g.h, g.w), (g.p, g.q), (g.r, g.s), (g.pad_top, g.pad_left), g.c, g.k)
    before = g.r - 1 - g.pad_top, g.s - 1 - g.pad_left
    return Walk(g.n, (g.p, g.q), (g.h, g.w), (g.r, g.s), before, g.k, g.c)


def plan(walk: Walk, tile: Tile, chosen: Layout) -> Plan | None:
    """Return how lines are best laid out, or None where shared memory or integers are too small.

    Padding is computed for nothing, and few stages of filters let the matrix units wait.
    """
    most = -(-walk.out[1] // PATTERN)
    plans = [_plan(walk, tile, chosen, strips) for strips in range(1, min(most, MAX_STRIPS) + 1)]
    fitting = [each for each in plans if each is not None]
    return min(fitting, key=lambda each: each.positions * (1 + 0.1 / (each.stages - 1)), default=None)


def _plan(walk: Walk, tile: Tile, chosen: Layout, strips: int) -> Plan | None:
    """Return how lines of images cut into strips lie, or None where they do not fit.

    Zeros right of a line are those left of the next, and zeros below an image those above the next, as long as either
    is as wide as the wider of both paddings.
    """
    (height, width), (above, left), (below, right) = walk.extent, walk.before, walk.behind
    image_lines = max(height + above, height + below, walk.out[0])
    strip_width = -(-walk.out[1] // strips)
    used = -(-walk.out[1] // strip_width)
    least = strip_width + walk.taps[1] - 1 if used > 1 else max(width + left, width + right, walk.out[1])
    pitch = least if chosen.dense else -(-least // PATTERN) * PATTERN
    lines = (pitch - 1 + tile.rows - 1 + walk.taps[1] - 1) // pitch + walk.taps[0]
    patch_bytes = -(-lines * pitch * ROW // 1024) * 1024
    stages = min(MAX_STAGES, (SHARED_BYTES - HEAD_BYTES - PATCHES * patch_bytes) // (tile.columns * ROW))
    positions = walk.images * used * image_lines * pitch
    if pitch > tensor_map.MAX_BOX or stages < MIN_STAGES or positions > MAX_POSITIONS:
        return None
    return Plan(pitch, image_lines, used, strip_width, positions, patch_bytes, stages)


def _cost(walk: Walk, tile: Tile, made: Plan) -> float:
    """Return a guess of cycles, to order candidates."""
    items = -(-made.positions // tile.rows) * -(-walk.columns // tile.columns)
    steps = walk.taps[0] * walk.taps[1] * -(-walk.channels // 64)
    return -(-items // device().num_processors) * (steps * tile.rows * tile.columns / 32 / tile.rate + 2500)


class _Product:
    """Runs a forward pass or an input gradient; see `products` for the operands."""

    def __init__(self, problem: Problem, tile: Tile, chosen: Layout) -> None:
        walk = walk_of(problem)
        made = plan(walk, tile, chosen)
        if made is None:
            raise ValueError(f"halo: {problem.key} does not fit tiles {tile.name}.")
        self._problem, self._walk, self._plan, self._layout = problem, walk, made, chosen
        items = -(-made.positions // tile.rows) * -(-walk.columns // tile.columns)
        kernel, given = f"conv2d_forward_halo_{tile.name}_{problem.compute}", (GIVEN,) * 4
        self._launches = {
            activation: device().prepare(
                *(SOURCE, kernel, (min(items, device().num_processors),), (THREADS,), *given, self._struct(number)),
                shared_bytes=made.shared_bytes(tile),
            )
            for activation, number in types.ACTIVATIONS.items()
        }
        width = ROW // problem.storage.itemsize
        extents, box = (walk.channels, *walk.extent[::-1], walk.images), (width, made.pitch, 1, 1)
        self._images = tensor_map.ByAddress(lambda x: tensor_map.tiled(x, extents, box))
        shape, part = (walk.channels, walk.taps[0] * walk.taps[1], walk.columns), (width, 1, tile.columns)
        self._filters = tensor_map.ByAddress(lambda turned: tensor_map.tiled(turned, shape, part))

    def __call__(self, x: Array, weight: Array, bias: Array | None, y: Array, activation: str | None) -> None:
        turned = filters.converted(weight, self._problem.compute, self._problem.kind == "input", temporary=True)
        self._launches[activation](self._images(x), self._filters(turned), bias, y)

    def _struct(self, activation: np.int32) -> np.ndarray:
        """Return the kernel's numbers."""
        walk, p = self._walk, self._plan
        chunks = -(-walk.channels * self._problem.storage.itemsize // ROW)
        taps = walk.taps[0] * walk.taps[1]
        lead = min(p.stages - 2, PATCHES * taps - 1, chunks * taps - 1) if LEAD else 0
        fields = (
            *(p.positions, p.pitch, p.image_lines, p.strips, p.strip_width, *walk.out, *walk.before, *walk.taps),
            *(chunks, walk.columns, activation, p.patch_bytes, p.stages, self._layout.based, lead),
        )
        return np.array(fields, HALO)


def layout() -> Layout | None:
    """Return the first layout with which the device in use computes right, or None; found once for a device."""
    name = device().name
    if name not in _layouts:
        _layouts[name] = next((each for each in LAYOUTS if computes_right(each)), None)
    return _layouts[name]


def computes_right(chosen: Layout, compute: Compute = "bf16") -> bool:
    """Return whether a small convolution of integers gives exactly what it should, with operands laid out so."""
    n, h, w, c, k = 2, 7, 11, 64, 16
    problem = Problem("forward", compute, Geometry(n, h, w, c, k, 3, 3, h, w, 1, 1, 1, 1, 1, 1, 1))
    x, weight = (np.random.default_rng(i).integers(-1, 2, s) for i, s in enumerate([(n, h, w, c), (k, 3, 3, c)]))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(padded[:, i : i + h, j : j + w] @ weight[:, i, j].T for i in range(3) for j in range(3))
    y = device().empty((n, h, w, k), problem.storage)
    operands = device().upload(x.astype(problem.storage)), device().upload(weight.astype(np.float32))
    candidate(problem, Tile(256, 64, 1.0), chosen).run(*operands, None, y, None)
    return bool(np.array_equal(np.asarray(device().download(y)).astype(np.float32), expected))
