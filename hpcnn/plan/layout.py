"""Which part of a layer's output each rank owns.

Legend: N samples of the global batch, P ranks, H W rows and columns, C channels.

An activation of the whole batch is one tensor (N, H, W, C), or (N, F) behind a flatten. A `Layout` is a process grid
over its axes: it cuts each axis into parts, and a rank owns the box where its parts cross. Boxes do not overlap and
cover everything; where there are more parts than indices, some are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TypeAlias

from hpcnn.arrays import Shape
from hpcnn.errors import PlanError
from hpcnn.geometry import Block, blocks, split

Box: TypeAlias = tuple[Block, ...]
"""A block of indices for each axis, samples first."""


def extent(box: Box) -> Shape:
    """Return the shape of an array that holds a box."""
    return tuple(block.size for block in box)


@lru_cache(1 << 14)
def volume(box: Box) -> int:
    """Return the number of elements in a box."""
    return prod(extent(box))


def intersect(first: Box, second: Box) -> Box:
    """Return what two boxes share; its blocks have size 0 where nothing is."""
    starts = [max(a.start, b.start) for a, b in zip(first, second, strict=True)]
    stops = [min(a.stop, b.stop) for a, b in zip(first, second, strict=True)]
    return tuple(Block(start, max(start, stop)) for start, stop in zip(starts, stops, strict=True))


def hull(boxes: Iterable[Box]) -> Box:
    """Return the smallest box around the boxes that are not empty; the first one if all are."""
    boxes = list(boxes)
    full = [box for box in boxes if volume(box)] or boxes[:1]
    return tuple(Block(min(b.start for b in axis), max(b.stop for b in axis)) for axis in zip(*full, strict=True))


def contains(outer: Box, inner: Box) -> bool:
    """Return whether `inner` lies in `outer`; a box whose blocks are all empty lies anywhere."""
    if not any(extent(inner)):
        return True
    return all(o.start <= i.start and i.stop <= o.stop for o, i in zip(outer, inner, strict=True))


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Return where `box` lies in an array that holds `outer`."""
    return tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A process grid: into how many parts the samples, rows, columns and channels of an output are cut.

    Ranks are numbered along the grid with the last axis changing fastest: `inner`, then channels, columns, rows and
    samples. Ranks beyond the grid own nothing. Weights are cut along `channel` and `inner` and replicated over
    everything else.

    `inner` cuts the channels of the *inputs* of a layer that sums over them. The ranks of a cell, those that differ in
    nothing else, make partial sums of the same box, and each owns a piece of its channels, where they are added up.
    """

    sample: int = 1
    height: int = 1
    width: int = 1
    channel: int = 1
    inner: int = 1

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise PlanError(f"layout: each number of parts (={self.grid}) must be at least 1.")

    @property
    def grid(self) -> tuple[int, int, int, int, int]:
        """Parts along samples, rows, columns, channels and the inputs' channels."""
        return self.sample, self.height, self.width, self.channel, self.inner

    @property
    def ranks(self) -> int:
        """Number of ranks in the grid."""
        return prod(self.grid)

    @property
    def cut(self) -> int:
        """Into how many parts a layer's weights are cut."""
        return self.channel * self.inner

    @property
    def name(self) -> str:
        """The word for this layout in plans and tables."""
        names = [("data", self.sample), ("spatial", self.height * self.width), ("filter", self.channel)]
        names += [("row", self.inner)]
        return "+".join(name for name, parts in names if parts > 1) or "data"

    def place(self, rank: int) -> tuple[int, int, int, int, int]:
        """Return the part of each axis that `rank` has."""
        if not 0 <= rank < self.ranks:
            raise PlanError(f"layout: rank (={rank}) must be below the number of ranks in the grid (={self.ranks}).")
        rank, inner = divmod(rank, self.inner)
        rank, channel = divmod(rank, self.channel)
        rank, column = divmod(rank, self.width)
        sample, row = divmod(rank, self.height)
        return sample, row, column, channel, inner

    def output_channels(self, rank: int, count: int, *, owned: bool = True) -> Block:
        """Return which of `count` output channels `rank` owns, or, if not `owned`, makes at least partial sums of."""
        if self.cut == 1:
            return Block(0, count)
        *_, channel, inner = self.place(rank)
        made = split(count, self.channel, channel)
        piece = split(made.size, self.inner, inner)
        return Block(made.start + piece.start, made.start + piece.stop) if owned else made

    def input_channels(self, rank: int, count: int) -> Block:
        """Return which of `count` input channels `rank` sums over."""
        return Block(0, count) if self.inner == 1 else split(count, self.inner, self.place(rank)[4])

    def boxes(
        self,
        ranks: int,
        num_samples: int,
        shape: Shape,
        rows: Sequence[Block] | None = None,
        columns: Sequence[Block] | None = None,
        *,
        owned: bool = True,
    ) -> tuple[Box, ...]:
        """Return what each of `ranks` ranks owns of a tensor (num_samples, *shape).

        Parameters
        ----------
        shape : (H, W, C) or (F,)
            Of one sample.
        rows, columns : sequence of Block, optional
            The parts of H and W; left out, they are as equal as can be.
        owned : bool
            False: what it makes at least partial sums of instead.

        Raises
        ------
        PlanError
            If the grid has more ranks, or cuts rows or columns of a tensor that has none.
        """
        if self.ranks > ranks:
            raise PlanError(f"layout: its grid {self.grid} needs {self.ranks} ranks, and there are {ranks}.")
        samples = blocks(num_samples, self.sample)
        channels = [self.output_channels(rank, shape[-1], owned=owned) for rank in range(self.ranks)]
        places = [self.place(rank) for rank in range(self.ranks)]
        nothing = (Block(0, 0),) * (1 + len(shape))
        if len(shape) == 1:
            if self.height * self.width > 1:
                raise PlanError(
                    f"layout: height (={self.height}) and width (={self.width}) cannot cut {shape[0]} features, which"
                    " have no rows and columns; both must be 1 there."
                )
            own: list[Box] = [(samples[n], own) for (n, *_), own in zip(places, channels, strict=True)]
        else:
            rows = blocks(shape[0], self.height) if rows is None else rows
            columns = blocks(shape[1], self.width) if columns is None else columns
            own = [(samples[n], rows[h], columns[w], own) for (n, h, w, *_), own in zip(places, channels, strict=True)]
        return (*(box if volume(box) else nothing for box in own), *[nothing] * (ranks - self.ranks))
