"""The borders between operations: how what one of them reads gets there, and how its gradient gets back.

What an operation reads is cut out of what this rank computed, or moved from the ranks that own it. Backward crosses a
border the other way: gradients are put in place, or sent back and summed. Boxes depend on the size of the batch, so
there is a route for each size: training has one, an evaluation two, for its last batch may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm import movement
from hpcnn.comm.movement import Mover
from hpcnn.comm.world import World
from hpcnn.geometry import Block
from hpcnn.nn.model import Model
from hpcnn.parallel.pieces import Pieces, make_pieces
from hpcnn.plan.layout import Box, extent, within
from hpcnn.plan.movement import Movement
from hpcnn.plan.placement import Placement
from hpcnn.spec import INPUT


class Border:
    """Where an operation reads a value, on this rank, for one size of batch.

    Parameters
    ----------
    source : str
        The value.
    computed, owned, needed : Box
        Of the value: what this rank has made, what it owns, and what is read.
    mover : Mover or None
        Brings what is needed; None where that is cut out of what is computed.

    Attributes
    ----------
    moves : bool
        Whether messages cross it.
    needed_shape : Shape
        Of what is read.
    """

    def __init__(self, source: str, computed: Box, owned: Box, needed: Box, mover: Mover | None) -> None:
        self.source = source
        self.moves = mover is not None
        self.needed_shape = extent(needed)
        self._mover = mover
        self._shape = extent(computed)
        self._whole = computed == (needed if mover is None else owned)
        self._cut = within(needed if mover is None else owned, computed)

    def begin(self, value: Array) -> None:
        """Begin to fetch what is needed, given the value that this rank has."""
        if self._mover is not None:
            self._mover.start(value if self._whole else value[self._cut])

    def end(self, value: Array) -> Array:
        """Return what is needed, having waited for it; `value` is as before."""
        part = value if self._whole else value[self._cut]
        return part if self._mover is None else self._mover.finish(part)

    def begin_back(self, grad: Array) -> None:
        """Begin to return the gradient of what was read."""
        if self._mover is not None:
            self._mover.start_back(grad)

    def end_back(self, grad: Array) -> Array:
        """Return the gradient of the value that this rank has, as far as this border knows; `grad` is as before."""
        if self._mover is None and self._whole:
            return grad
        total = arrays.empty(self._shape, grad.dtype)
        if not self._whole:
            total.fill(0)
        if self._mover is None:
            total[self._cut] = grad
        else:
            self._mover.finish_back(grad, total[self._cut])
        return total


@dataclass(frozen=True)
class Route:
    """What this rank reads and computes of a batch of one size, and the borders of its operations."""

    images: Box
    computed: dict[str, Box]
    borders: dict[str, tuple[Border, ...]]
    pieces: dict[str, Pieces]
    """Of the operations that begin before all of their input is there."""
    loss: Border
    labels: Block
    """The samples of the batch whose loss this rank computes."""


def make_route(model: Model, placement: Placement, world: World, algorithm: str, *, overlap: bool) -> Route:
    """Return this rank's route (collective where anything is moved).

    Parameters
    ----------
    placement : Placement
        Of a batch of some size.
    algorithm : str
        Of all-gathers and reduce-scatters.
    overlap : bool
        Whether movements get on while this rank computes.
    """
    rank, layers, dtype = world.rank, placement.layers, model.parameters.values.dtype

    def border(source: str, reader: str, needed: tuple[Box, ...], *, moved: bool) -> Border:
        if source == INPUT:
            return Border(source, placement.images[rank], needed[rank], needed[rank], None)
        mover, place = None, layers[source]
        if moved:
            way = Movement(place.owned, needed)
            mover = movement.prepare(world.engine, way, dtype, label=f"{source} to {reader}", algorithm=algorithm)
        return Border(source, place.computed[rank], place.owned[rank], needed[rank], mover)

    borders = {
        layer.name: tuple(
            border(source, layer.name, layers[layer.name].needed, moved=moved)
            for source, moved in zip(layer.inputs, layers[layer.name].moved, strict=True)
        )
        for layer in model.spec.layers
    }
    return Route(
        images=placement.images[rank],
        computed={name: placed.computed[rank] for name, placed in layers.items()},
        borders=borders,
        pieces=make_pieces(model, placement, rank) if overlap else {},
        loss=border(model.spec.layers[-1].name, "loss", placement.loss, moved=placement.loss_moved),
        labels=placement.loss[rank][0],
    )
