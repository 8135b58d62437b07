"""Global tensors of a model of which each rank has parts: gathered for checkpoints, and cut out of them.

State on disk has no ranks in it, so a run may go on with another plan. Where a plan cuts no parameters, what a rank
has is the whole already, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm.world import World
from hpcnn.nn.model import Model
from hpcnn.nn.parameter import ParameterSet, assign
from hpcnn.plan.planner import Plan


class Whole:
    """The way between a rank's flat vectors and global tensors.

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
        cuts = plan.cut
        self._own = {
            parameter: (layer.name, part.channels)
            for layer, part in zip(model.spec.layers, model.parts, strict=True)
            for parameter in (f"{layer.name}/{short}" for short in layer.parameters)
            if cuts[layer.name] > 1
        }
        self._cuts = cuts

    @property
    def is_cut(self) -> bool:
        """Whether any rank lacks a part of the parameters."""
        return bool(self._own)

    def tensors(self, flat: Array) -> dict[str, Array]:
        """Return, on rank 0, global tensors from everyone's flat vectors; views where nothing is cut (collective).

        Of parts that several ranks have, the first one's counts. Other ranks get what they have.
        """
        parameters = self._model.parameters
        mine = {parameter.name: parameters.view(flat, parameter.name) for parameter in parameters.parameters}
        if not self.is_cut:
            return mine
        rank = self._world.rank
        parts = [
            (name, own.start, own.stop, mine[name])
            for name, (layer, own) in self._own.items()
            if 0 < rank < self._cuts[layer]
        ]
        everyone = self._world.gather_obj(parts)
        if rank != 0:
            return mine
        shapes = {
            f"{layer.name}/{short}": shape
            for layer in self._model.spec.layers
            for short, shape in layer.parameters.items()
        }
        whole = dict(mine)
        for name, (_, own) in self._own.items():
            whole[name] = arrays.empty(shapes[name], flat.dtype)
            whole[name][own.start : own.stop] = mine[name]
        for name, start, stop, part in (one for some in everyone or [] for one in some):
            whole[name][start:stop] = part
        return whole

    def room(self, state: Mapping[str, Array]) -> tuple[ParameterSet, dict[str, Array]]:
        """Return parameters and optimizer state to put global tensors into; the model's own where nothing is cut."""
        if not self.is_cut:
            return self._model.parameters, dict(state)
        parameters = ParameterSet.of(self._model.spec.layers, self._model.parameters.values.dtype)
        slots = {slot: arrays.empty(parameters.values.shape, flat.dtype) for slot, flat in state.items()}
        return parameters, slots

    def take(self, parameters: ParameterSet, state: Mapping[str, Array], own_state: Mapping[str, Array]) -> None:
        """Cut this rank's parts out of what `room` returned and everybody has by now."""
        if not self.is_cut:
            return
        pairs = [(parameters.values, self._model.parameters.values)]
        pairs += [(state[slot], own_state[slot]) for slot in state]
        for source, target in pairs:
            for parameter in self._model.parameters.parameters:
                _, own = self._own.get(parameter.name, ("", None))
                found = parameters.view(source, parameter.name)
                part = found if own is None else found[own.start : own.stop]
                assign(self._model.parameters.view(target, parameter.name), part)
