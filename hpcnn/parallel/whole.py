"""Global tensors of a model of which each rank has parts: gathered for checkpoints, and cut out of them.

State on disk has no ranks in it, so a run may go on with another plan, and no device: global tensors are on the host.
Where a plan cuts no parameters, and they are on the host, what a rank has is the whole already, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array, Shape
from hpcnn.comm.world import World
from hpcnn.geometry import slices
from hpcnn.nn.model import Model
from hpcnn.nn.parameter import ParameterSet, assign
from hpcnn.plan.planner import Plan


class _Cut(NamedTuple):
    """A tensor of which this rank has a part: in how many parts it is, its shape, and where the part lies."""

    parts: int
    shape: Shape
    place: tuple[slice, ...]


class Room(NamedTuple):
    """Where global tensors are put: parameters, optimizer state by slot, and statistics by name."""

    parameters: ParameterSet
    state: Mapping[str, Array]
    statistics: Mapping[str, np.ndarray]


class Whole:
    """The way between what a rank has and global tensors.

    Parameters
    ----------
    model : Model
        With this rank's parts.
    plan : Plan
        Says which layers are cut.
    world : World
        The ranks.
    """

    def __init__(self, model: Model, plan: Plan, world: World) -> None:
        self._model = model
        self._world = world
        self._cuts = {
            f"{layer.name}/{short}": _Cut(plan.cut[layer.name], shape, slices(part.tensors[short]))
            for layer, part in zip(model.spec.layers, model.parts, strict=True)
            for short, shape in (layer.parameters | layer.statistics).items()
            if plan.cut[layer.name] > 1
        }

    @property
    def is_cut(self) -> bool:
        """Whether any rank lacks a part of the parameters."""
        return bool(self._cuts)

    def tensors(self, flat: Array) -> dict[str, Array]:
        """Return, on rank 0, global tensors from everyone's flat vectors; views where nothing is cut (collective).

        Of parts that several ranks have, the first one's counts. Other ranks get what they have.
        """
        parameters, flat = self._model.parameters, arrays.to_host(flat)
        return self._gather({one.name: parameters.view(flat, one.name) for one in parameters.parameters})

    def statistics(self) -> dict[str, np.ndarray]:
        """Return, on rank 0, the global statistics, in the same way (collective)."""
        return self._gather({name: arrays.to_host(own) for name, own in self._model.statistics.items()})

    def _gather(self, mine: dict[str, Array]) -> dict[str, Array]:
        if not self.is_cut:
            return mine
        rank = self._world.rank
        parts = [
            (name, self._cuts[name].place, part)
            for name, part in mine.items()
            if name in self._cuts and rank < self._cuts[name].parts
        ]
        everyone = self._world.gather_obj(parts if rank else [])
        if rank != 0:
            return mine
        whole = dict(mine)
        for name, _, part in parts:
            whole[name] = arrays.empty(self._cuts[name].shape, part.dtype)
        for name, place, part in (one for some in (parts, *(everyone or [])) for one in some):
            whole[name][place] = part
        return whole

    @property
    def is_here(self) -> bool:
        """Whether what this rank has is the whole, on the host."""
        return not self.is_cut and arrays.on_host(self._model.parameters.values)

    def room(self, state: Mapping[str, Array], statistics: Mapping[str, Array]) -> Room:
        """Return where to put global parameters, and such state and statistics; the own if that is the whole."""
        model = self._model
        if self.is_here:
            return Room(model.parameters, state, statistics)
        parameters = ParameterSet.of(model.spec.layers, model.parameters.values.dtype)
        slots = {slot: arrays.empty(parameters.values.shape, flat.dtype) for slot, flat in state.items()}
        kept = {
            name: arrays.empty(self._cuts[name].shape if name in self._cuts else own.shape, own.dtype)
            for name, own in statistics.items()
        }
        return Room(parameters, slots, kept)

    def take(self, room: Room, state: Mapping[str, Array]) -> None:
        """Cut this rank's parts out of what `room` returned and everybody has by now."""
        if self.is_here:
            return
        own = self._model.parameters
        pairs = [(room.parameters.values, own.values)]
        pairs += [(room.state[slot], state[slot]) for slot in room.state]
        for source, target in pairs:
            flat = target if arrays.on_host(target) else arrays.empty(target.shape, target.dtype)
            for parameter in own.parameters:
                found = room.parameters.view(source, parameter.name)
                assign(own.view(flat, parameter.name), self._part(parameter.name, found))
            if flat is not target:
                arrays.overwrite(target, flat)
        for name, found in room.statistics.items():
            arrays.overwrite(self._model.statistics[name], self._part(name, found))

    def _part(self, name: str, found: Array) -> Array:
        return found[self._cuts[name].place] if name in self._cuts else found
