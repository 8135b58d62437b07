"""Tiles into which products of `wgmma` are cut: how blocks work on them, and which are likely the fastest."""

from __future__ import annotations

from typing import NamedTuple

from hpcnn.arrays import Pair
from hpcnn.ops.cuda.device import device

ROW = 128
"""Bytes of a step along the summed dimension."""
SLAB_BYTES = 2 * 64 * (256 + 16)
BARRIER_BYTES = (2 * 8 + 2) * 8
OFFERED = 10
MIN_STEPS = 8
"""Steps that a split product leaves a block at least."""


class Tile(NamedTuple):
    """A block's part of a product, and how blocks and their groups of warps work together.

    `down`, `across`: blocks of a cluster that differ in rows and in columns; they share what they load. `alternate`:
    each of the two multiplying groups has tiles of its own, and one multiplies while the other stores. `engine`: the
    copy engine stores outputs of which it can.
    """

    rows: int
    columns: int
    stages: int
    down: int = 1
    across: int = 1
    alternate: bool = False
    engine: bool = False

    @property
    def name(self) -> str:
        """How kernels name it."""
        cluster = f"_{self.down}x{self.across}" if self.cluster > 1 else ""
        return f"{self.rows}x{self.columns}{'a' if self.alternate else ''}{'s' if self.engine else ''}{cluster}"

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.down * self.across

    @property
    def plain(self) -> bool:
        """Whether blocks work on their own, as split products and those in tf32 need it."""
        return self.cluster == 1 and not self.alternate and not self.engine

    @property
    def source(self) -> str:
        """File of the kernels."""
        return "conv2d_wgmma" if self.plain else "conv2d_wgmma_cluster"

    @property
    def box(self) -> int:
        """Pixels that one copy of the pixels' side brings."""
        return min(128, self.rows // self.across)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory."""
        return self.stages * (self.rows + self.columns) * ROW + SLAB_BYTES + BARRIER_BYTES

    def items(self, rows: int, columns: int) -> int:
        """Return how many clusters' tiles cover a product."""
        return -(-rows // (self.rows * self.down)) * -(-columns // (self.columns * self.across))

    def cycles(self, steps: int, out_bytes: int) -> float:
        """Return an estimate of a block's time for one tile, to order candidates."""
        area = self.rows * self.columns
        loaded = (self.rows / self.across + self.columns / self.down) * ROW
        multiplying = steps * max(area / 32, loaded / L2_BYTES_PER_CYCLE)
        storing = 500 + area * out_bytes / STORED_BYTES_PER_CYCLE / (2 if self.engine else 1)
        return max(multiplying, (multiplying + storing) / 2) if self.alternate else multiplying + storing


L2_BYTES_PER_CYCLE, STORED_BYTES_PER_CYCLE = 40, 8
"""What a processor gets from the second-level cache and puts out at the end of a tile, as measured on an H200."""

PIXEL_TILES = (
    *(Tile(128, 256, 4), Tile(256, 128, 4), Tile(128, 128, 6), Tile(128, 64, 8)),
    *(Tile(128, 256, 4, down=2), Tile(256, 128, 4, down=2), Tile(256, 128, 4, across=2)),
    Tile(128, 256, 4, down=2, across=2),
    *(Tile(128, 128, 6, alternate=True), Tile(128, 128, 6, down=2, alternate=True)),
    *(Tile(128, 128, 6, down=4, alternate=True), Tile(128, 128, 6, down=2, across=2, alternate=True)),
    *(Tile(256, 64, 4, alternate=True), Tile(256, 64, 4, down=2, alternate=True)),
    *(Tile(256, 128, 4, engine=True), Tile(256, 128, 4, down=2, engine=True), Tile(128, 256, 4, down=2, engine=True)),
    *(Tile(128, 128, 6, alternate=True, engine=True), Tile(128, 128, 6, down=2, alternate=True, engine=True)),
    Tile(256, 64, 4, alternate=True, engine=True),
)
PHASE_TILES = tuple(
    tile for tile in PIXEL_TILES if tile.plain or (tile.alternate and not tile.engine and tile.cluster == 1)
)
"""Those in which all phases of an input gradient are computed by one launch, in bf16 and tf32."""
WEIGHT_TILES = (
    *(Tile(128, 256, 4), Tile(256, 128, 4), Tile(128, 192, 4), Tile(128, 128, 6)),
    *(Tile(128, 256, 4, down=2), Tile(128, 256, 4, across=2), Tile(128, 192, 4, across=2)),
    *(Tile(256, 128, 4, across=2), Tile(128, 128, 6, across=2, alternate=True)),
    Tile(128, 128, 6, down=2, across=2, alternate=True),
    *(Tile(64, 256, 4, alternate=True), Tile(64, 192, 5, alternate=True)),
)

EVEN_TILES = (
    *(Tile(128, 256, 4), Tile(256, 128, 4), Tile(128, 192, 4), Tile(128, 128, 6), Tile(256, 192, 3)),
    *(Tile(128, 256, 4, down=2), Tile(256, 128, 4, across=2), Tile(256, 128, 4, down=2), Tile(256, 192, 3, down=2)),
)
"""Those of `kernels/conv2d_wgmma_even.cu`, which cut the row of all tiles' steps into equal parts."""
EVEN_OFFERED = 5
EVEN_MIN_STEPS = 4


class Cut(NamedTuple):
    """How weight gradients are shared out evenly: all steps of all tiles of clusters in a row, cut for `clusters`.

    `struct Cut` of the kernels.
    """

    tile_rows: int
    tile_columns: int
    steps: int
    clusters: int

    @property
    def tiles(self) -> int:
        """Tiles of clusters."""
        return self.tile_rows * self.tile_columns

    @property
    def cuts_tiles(self) -> bool:
        """Whether some tile is cut, so that there are partial sums to add."""
        total = self.tiles * self.steps
        return any(total * cluster // self.clusters % self.steps for cluster in range(1, self.clusters))

    @property
    def lanes(self) -> int:
        """Threads that share the partial sums of one place: a power of two that leaves each no more than some eight."""
        parts = self.clusters // self.tiles
        return next((lanes for lanes in (1, 2, 4, 8) if parts <= 8 * lanes), 16)


def even_cut(tile: Tile, shape: Pair, steps: int) -> Cut:
    """Return how clusters share a product of a shape, no more of them than get some steps each."""
    rows, columns = -(-shape[0] // (tile.rows * tile.down)), -(-shape[1] // (tile.columns * tile.across))
    most = max(1, rows * columns * steps // EVEN_MIN_STEPS)
    return Cut(rows, columns, steps, min(clusters(tile), most))


def even_plans(shape: Pair, steps: int) -> list[Tile]:
    """Return the tiles that likely serve even shares of a product best, the fastest first."""

    def cycles(tile: Tile) -> float:
        cut = even_cut(tile, shape, steps)
        loaded = (tile.rows / tile.across + tile.columns / tile.down) * ROW
        each = max(tile.rows * tile.columns / 32, loaded / L2_BYTES_PER_CYCLE)
        stores = 2 if cut.cuts_tiles else max(1, cut.tiles // cut.clusters)
        return -(-cut.tiles * steps // cut.clusters) * each + stores * tile.rows * tile.columns / 8

    def countable(tile: Tile) -> bool:
        cut = even_cut(tile, shape, steps)
        return cut.tiles * cut.steps * cut.clusters < 2**31

    return sorted(filter(countable, EVEN_TILES), key=cycles)[:EVEN_OFFERED]


def plans(tiles: tuple[Tile, ...], shape: Pair, steps: int, max_splits: int, out_bytes: int) -> list[tuple[Tile, int]]:
    """Return tiles and in how many parts to sum a product of a shape, the likely fastest first."""
    cost = {}
    for tile in tiles:
        items, at_once = tile.items(*shape), clusters(tile)
        for splits in _splits(max(1, min(max_splits, steps // MIN_STEPS)), items, at_once):
            turns = -(-items * splits // at_once)
            cycles = turns * tile.cycles(-(-steps // splits), out_bytes if splits == 1 else 4)
            if tile.alternate:
                cycles += tile.rows * tile.columns * out_bytes / STORED_BYTES_PER_CYCLE  # the last tile's
            partial = 4 * shape[0] * shape[1] * (splits + 1) / 1500 + 5000 if splits > 1 else 0
            cost[tile, splits] = cycles + partial
    return sorted(cost, key=lambda plan: cost[plan])


def offered(found: list[tuple[Tile, int]]) -> list[tuple[Tile, int]]:
    """Return the first of the plans, no more than two with one tile, and one of blocks on their own among them."""
    chosen: list[tuple[Tile, int]] = []
    for plan in found:
        if sum(plan[0] == tile for tile, _ in chosen) < 2:
            chosen.append(plan)
    plain = next(plan for plan in found if plan[0].plain)
    return chosen[:OFFERED] if plain in chosen[:OFFERED] else [*chosen[: OFFERED - 1], plain]


def _splits(most: int, items: int, clusters: int) -> set[int]:
    """Return numbers of parts to consider: powers of two, and those with which all clusters get as many tiles."""
    even = {turns * clusters // items for turns in (1, 2, 3)}
    return {splits for splits in {2**i for i in range(9)} | even if 1 <= splits <= most}


def clusters(tile: Tile) -> int:
    """Return how many clusters run at once.

    The processors of a cluster are of one group (GPC) of mostly 16 or 18, which 4 need not divide.
    """
    processors = device().num_processors
    return max(1, (processors - (processors // 32 if tile.cluster > 2 else 0)) // tile.cluster)
