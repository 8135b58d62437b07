"""The borders between operations: how what one of them reads gets there, and how its gradient gets back.

What an operation reads is cut out of what this rank computed, or moved from the ranks that own it. Backward crosses a
border the other way: gradients are put in place, or sent to the owners and summed, as they are too where a layer
settles what it has cut out. Boxes depend on the size of the batch, so there is a route for each size: training has one,
an evaluation two, for its last batch may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm import movement
from hpcnn.comm.movement import Mover
from hpcnn.comm.world import World
from hpcnn.geometry import Block
from hpcnn.nn.layer import Layer
from hpcnn.nn.model import Model
from hpcnn.parallel.narrow import Cuts, make_cuts
from hpcnn.parallel.pieces import Pieces, make_pieces, padded
from hpcnn.parallel.widen import Widened
from hpcnn.plan.layout import Box, extent, within
from hpcnn.plan.movement import Movement
from hpcnn.plan.placement import Placement
from hpcnn.spec import INPUT

Boxes: TypeAlias = tuple[Box, ...]


@dataclass(frozen=True)
class Way:
    """One direction of a border, on this rank: boxes of the value."""

    held: Box
    """What this rank has, of the value or of its gradient."""
    owned: Box
    read: Box
    mover: Mover | None
    """Between what is owned and what is read; None where what is read lies in what is held."""

    @property
    def place(self) -> tuple[slice, ...]:
        """Where what takes part lies in what is held."""
        return within(self.read if self.mover is None else self.owned, self.held)

    @property
    def is_whole(self) -> bool:
        """Whether that is all of it."""
        return self.held == (self.read if self.mover is None else self.owned)


class Border:
    """Where an operation reads a value, on this rank, for one size of batch.

    Parameters
    ----------
    source : str
        The value.
    there, back : Way
        What this rank reads, of what it has made; and of what it then has the gradient, for what it goes back through.

    Attributes
    ----------
    moves_back : bool
        Whether gradients cross it in messages.
    reached_shape : Shape
        Of the gradient of what was read.
    """

    def __init__(self, source: str, there: Way, back: Way) -> None:
        self.source = source
        self.moves_back = back.mover is not None
        self.reached_shape = extent(back.read)
        self._there, self._back = there.mover, back.mover
        self._whole, self._cut = there.is_whole, there.place
        self._fills, self._place = back.is_whole, back.place
        self._shape = extent(back.held)

    @classmethod
    def within(cls, source: str, box: Box) -> Border:
        """Return the border of a reader that takes all that this rank has of a value."""
        way = Way(box, box, box, None)
        return cls(source, way, way)

    def begin(self, value: Array) -> None:
        """Begin to fetch what is needed, given the value that this rank has."""
        if self._there is not None:
            self._there.start(value if self._whole else value[self._cut])

    def end(self, value: Array) -> Array:
        """Return what is needed, having waited for it; `value` is as before."""
        part = value if self._whole else value[self._cut]
        return part if self._there is None else self._there.finish(part)

    def begin_back(self, grad: Array) -> None:
        """Begin to return the gradient of what was read."""
        if self._back is not None:
            self._back.start_back(grad)

    def end_back(self, grad: Array) -> Array:
        """Return the gradient of the value that this rank has, as far as this border knows; `grad` is as before."""
        if self._back is None and self._fills:
            return grad
        total = arrays.empty(self._shape, grad.dtype, like=grad)
        if not self._fills:
            total.fill(0)
        if self._back is not None:
            self._back.finish_back(grad, total[self._place])
        elif grad.size:  # a shortcut may read no channel of rows that nothing else goes back through
            total[self._place] = grad
        return total


class PartialSums:
    """Where partial sums over input channels are added up, each at its owner: a movement taken the other way round.

    Parameters
    ----------
    owned : Box
        Whose sums this rank completes.
    mover : Mover
        From owners to all that made a part; its way back adds.
    """

    def __init__(self, owned: Box, mover: Mover) -> None:
        self._shape = extent(owned)
        self._mover = mover

    def complete(self, partial: Array) -> Array:
        """Return the sums that this rank owns, from everyone's partial ones."""
        sums = arrays.empty(self._shape, partial.dtype, like=partial)
        self._mover.start_back(partial)
        self._mover.finish_back(partial, sums)
        return sums

    def spread(self, error: Array) -> Array:
        """Return the error of all sums of which this rank made a part, from that of those it owns."""
        self._mover.start(error)
        return self._mover.finish(error)


@dataclass(frozen=True)
class Route:
    """What this rank reads and computes of a batch of one size, and the borders of its operations.

    Of operations that are in `sums`, `computed` says of what it makes partial sums.
    """

    images: Box
    computed: dict[str, Box]
    returned: dict[str, Box]
    """What it goes back through, of every output."""
    layers_back: dict[str, Layer[Any]]
    """For operations that go back through less than they have computed, with the padding of that."""
    cuts: Cuts
    sums: dict[str, PartialSums]
    borders: dict[str, tuple[Border, ...]]
    pieces: dict[str, Pieces]
    """Of the operations that begin before all of their input is there."""
    loss: Border
    labels: Block
    """The samples of the batch whose loss this rank computes."""


def make_route(
    model: Model, placement: Placement, world: World, algorithm: str, *, overlap: bool, rank: int | None = None
) -> Route:
    """Return this rank's route (collective where anything is moved).

    Parameters
    ----------
    placement : Placement
        Of a batch of some size.
    algorithm : str
        Of all-gathers and reduce-scatters.
    overlap : bool
        Whether movements get on while this rank computes.
    rank : int, optional
        Whose route; left out, this rank's. That of another is for placements in which nothing moves.
    """
    rank, layers = world.rank if rank is None else rank, placement.layers

    def mover(way: Movement, label: str, back: str = "") -> Mover:
        narrow, like = model.activation.itemsize < 4, model.parameters.values
        dtype = np.dtype(np.float32) if narrow else model.activation
        made = movement.prepare(world.engine, way, dtype, label=label, back=back, algorithm=algorithm, like=like)
        return Widened(made, model.activation) if narrow else made

    def border(source: str, reader: str, needed: Boxes, reached: Boxes, *, moved: bool, settled: bool) -> Border:
        if source == INPUT:
            images = placement.images[rank]
            return Border(source, *(Way(images, images, boxes[rank], None) for boxes in (needed, reached)))
        place = layers[source]

        def prepare(boxes: Boxes) -> Mover:
            return mover(Movement(place.owned, boxes), f"{source} to {reader}")

        there = prepare(needed) if moved else None
        back = there if reached == needed and not settled else prepare(reached) if moved or settled else None
        return Border(
            source,
            Way(place.computed[rank], place.owned[rank], needed[rank], there),
            Way(place.returned[rank], place.owned[rank], reached[rank], back),
        )

    sums = {}
    for name, placed in layers.items():
        way = placement.summing(name)
        if way is not None:
            adder = mover(way, f"errors of {name}", f"partial sums of {name}")
            sums[name] = PartialSums(placed.owned[rank], adder)
    borders = {
        layer.name: tuple(
            border(source, layer.name, placed.needed, placed.reached, moved=moved, settled=settled)
            for source, moved, settled in zip(layer.inputs, placed.moved, placed.settled, strict=True)
        )
        for layer, placed in ((layer, layers[layer.name]) for layer in model.spec.layers)
    }
    loss, last = placement.loss, model.spec.layers[-1].name
    return Route(
        images=placement.images[rank],
        computed={name: placed.partial[rank] for name, placed in layers.items()},
        returned={name: placed.made_back[rank] for name, placed in layers.items()},
        layers_back={
            spec.name: padded(model, layer, spec, layers[spec.name].returned[rank])
            for spec, layer in zip(model.spec.layers, model.layers, strict=True)
            if layers[spec.name].returned[rank] != layers[spec.name].computed[rank]
        },
        cuts=make_cuts(model.spec, placement, rank),
        sums=sums,
        borders=borders,
        pieces=make_pieces(model, placement, rank) if overlap else {},
        loss=border(last, "loss", loss, loss, moved=placement.loss_moved, settled=False),
        labels=placement.loss[rank][0],
    )
