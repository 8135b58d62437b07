"""What backward keeps of a forward pass, where gradients do not go back through all that a rank computed.

A layer that settles leaves the border that its rank computed for it to the owners: of what the layers below have saved,
backward needs less. An activation is often saved twice, as the output of a layer and the input of the next, so it is
cut once, and both keep parts of one copy; what is cut off is free when the last reader has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.nn.layer import Layer, Narrow, Saved
from hpcnn.plan.layout import Box, extent, hull, within
from hpcnn.plan.placement import Placement
from hpcnn.spec import INPUT, ModelSpec


@dataclass(frozen=True)
class Cut:
    """The boxes of an operation whose output, input or both are cut, on one rank."""

    computed: Box
    returned: Box
    needed: Box
    reached: Box
    sources: tuple[str | None, ...]
    """The values that the inputs are parts of; None where they were fetched, or come from the loader."""


@dataclass(frozen=True)
class Cuts:
    """What is cut on one rank: operations, and of every value the box that is computed and the one that is kept."""

    operations: dict[str, Cut]
    values: dict[str, tuple[Box, Box]]


def make_cuts(model: ModelSpec, placement: Placement, rank: int) -> Cuts:
    """Return what `rank` cuts; no operation unless a layer settles."""
    placed = placement.layers
    sources = {
        layer.name: tuple(
            None if moved or source == INPUT else source
            for source, moved in zip(layer.inputs, placed[layer.name].moved, strict=True)
        )
        for layer in model.layers
    }
    values = {
        name: (
            one.computed[rank],
            hull([one.returned[rank], *(placed[r].reached[rank] for r in sources if name in sources[r])]),
        )
        for name, one in placed.items()
    }
    smaller = {name for name, (computed, kept) in values.items() if kept != computed}
    operations = {
        name: Cut(one.computed[rank], one.returned[rank], one.needed[rank], one.reached[rank], sources[name])
        for name, one in placed.items()
        if one.returned[rank] != one.computed[rank] or not smaller.isdisjoint(sources[name])
    }
    return Cuts(operations, values)


class Narrower:
    """Cuts what the operations of one forward pass saved.

    Parameters
    ----------
    cuts : Cuts
        What is cut.
    values : dict of str to Array
        The values of the pass that are still to be read, kept up to date by the caller.
    """

    def __init__(self, cuts: Cuts, values: dict[str, Array]) -> None:
        self._cuts = cuts
        self._values = values
        self._kept: dict[str, Array] = {}

    def narrow(self, layer: Layer[Any], saved: Saved) -> Saved:
        """Return what backward needs of what a layer saved; all that read its output have run."""
        name = layer.spec.name
        cut = self._cuts.operations.get(name)
        if cut is None or saved is None:
            return saved
        to = Narrow(
            inputs=tuple(partial(self._input, cut, source) for source in cut.sources),
            output=partial(self._part, name, cut.returned),
            own=partial(_copy, cut.computed, cut.returned),
            input_shape=extent(cut.reached),
        )
        return layer.narrow(saved, to)

    def _input(self, cut: Cut, source: str | None, x: Array) -> Array:
        if source is not None and (source in self._kept or source in self._values):
            return self._part(source, cut.reached, self._values.get(source))
        return _copy(cut.needed, cut.reached, x)

    def _part(self, name: str, box: Box, value: Array) -> Array:
        """Return a box of what is kept of a value; the first time `value` is what was computed."""
        computed, kept = self._cuts.values[name]
        if name not in self._kept:
            self._kept[name] = _copy(computed, kept, value)
        return self._kept[name][within(box, kept)]


def _copy(whole: Box, box: Box, array: Array) -> Array:
    """Return a copy of a box of an array that holds `whole`; the array itself where that is the same."""
    if box == whole:
        return array
    part = arrays.empty(extent(box), array.dtype, like=array)
    part[...] = array[within(box, whole)]
    return part
