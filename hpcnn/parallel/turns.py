"""Groups of layers that a rank computes in turns: a layer to the program, a chain of layers on a tile in every turn.

The layers of a tile use the parameters of the model, and what the rank computes is cut, so nothing here knows of other
ranks. Gradients are overwritten by the first turn; later ones compute theirs apart and add them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.nn.build import build
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer, Saved
from hpcnn.nn.model import Model
from hpcnn.nn.parameter import Parameter, ParameterSet
from hpcnn.plan.layout import Box, Layout, extent, within
from hpcnn.plan.parts import part
from hpcnn.plan.planner import Plan
from hpcnn.plan.turns import GroupSpec, turn_boxes
from hpcnn.spec import LayerSpec


class Turns(Layer[GroupSpec]):
    """A group on this rank. Parameters are those of all its layers, by their full names.

    Parameters
    ----------
    spec : GroupSpec
        The group.
    read, made : Box
        What the rank reads of the group's input, and makes of its output; rows and columns count.
    parameters : ParameterSet
        Of the model.
    """

    joint_backward = True

    def __init__(self, spec: GroupSpec, read: Box, made: Box, parameters: ParameterSet) -> None:
        names = [f"{layer.name}/{short}" for layer in spec.layers for short in layer.parameters]
        self.spec = spec
        self.parameters = {name: parameters[name] for name in names}
        self.statistics = {}
        self._made_shape = extent(made)[1:]
        apart = _gradients_apart(spec, self.parameters)
        self._turns = [
            _Turn(spec, boxes, within(boxes[0], read), within(boxes[-1], made), parameters, apart if index else {})
            for index, boxes in enumerate(turn_boxes(spec, made))
        ]

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the output, shape (N, P, Q, K); saved: the input."""
        (x,) = inputs
        if not x.size:  # the batch is too small for this rank
            return x, x
        y = arrays.empty((len(x), *self._made_shape), x.dtype, like=x)
        for turn in self._turns:
            y[turn.makes] = turn.forward(x, context)
        return y, (x if context.training else None)

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Overwrite all gradients; return that of the input, nothing where the group reads the images."""
        x: Array = saved
        if not x.size:
            for parameter in self.parameters.values():
                parameter.grad.fill(0)
            return (error.reshape(x.shape),) if self.spec.goes_back(0) else ()
        total = arrays.zeros(x.shape if self.spec.goes_back(0) else 0, x.dtype, like=x)
        for turn in self._turns:
            grad = turn.backward(x, error, context)
            if grad is not None:
                total[turn.reads] += grad
        return (total,) if self.spec.goes_back(0) else ()


class _Turn:
    """The layers of a group on one tile.

    Parameters
    ----------
    boxes : sequence of Box
        What is read of the group's input, and made of each layer's output.
    reads, makes : tuple of slice
        Where the first and the last of them lie in the rank's arrays.
    parameters : ParameterSet
        Of the model.
    apart : dict of str to Parameter
        Where the gradients are not to be overwritten: the same parameters with gradients elsewhere.
    """

    def __init__(
        self,
        spec: GroupSpec,
        boxes: Sequence[Box],
        reads: tuple[slice, ...],
        makes: tuple[slice, ...],
        parameters: ParameterSet,
        apart: Mapping[str, Parameter],
    ) -> None:
        every_sample = (slice(None),)
        self.reads, self.makes = every_sample + reads[1:], every_sample + makes[1:]
        self._goes_back = [spec.goes_back(index) for index in range(len(spec.layers) + 1)]
        self._layers: list[Layer[LayerSpec]] = []
        self._sums: list[list[tuple[Array, Array]]] = []
        for layer, box in zip(spec.layers, boxes[1:], strict=True):
            local = build(part(layer, Layout(), box, 0).spec, parameters)
            totals = local.parameters
            local.parameters = {short: apart.get(p.name, p) for short, p in totals.items()}
            self._layers.append(local)
            self._sums.append([(totals[short].grad, apart[p.name].grad) for short, p in totals.items() if apart])

    def forward(self, x: Array, context: StepContext) -> Array:
        """Return the tile of the output."""
        value = _tile(x, self.reads)
        for layer in self._layers:
            value, _ = layer.forward((value,), context)
        return value

    def backward(self, x: Array, grad_output: Array, context: StepContext) -> Array | None:
        """Run forward once more and go back: add up gradients, and return that of the tile of the input where due."""
        value, saved = _tile(x, self.reads), []
        for layer in self._layers:
            value, kept = layer.forward((value,), context)
            saved.append(kept)
        del value
        grad = _tile(grad_output, self.makes)
        for index in reversed(range(len(self._layers))):
            if not self._goes_back[index + 1]:
                return None
            layer, kept = self._layers[index], saved.pop()
            error = layer.error(grad, kept, context)
            layer.backward_weight(error, kept, context)
            for total, added in self._sums[index]:
                total += added
            if not self._goes_back[index]:
                return None
            (grad,) = layer.backward_input(error, kept, context)
        return grad


def _tile(x: Array, where: tuple[slice, ...]) -> Array:
    """Return a part of an array in one piece: the operators would make copies of their own otherwise."""
    view = x[where]
    if view.flags.c_contiguous:
        return view
    tile = arrays.empty(view.shape, view.dtype, like=x)
    tile[...] = view
    return tile


def _gradients_apart(spec: GroupSpec, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return the parameters with gradients in one place for all layers, of which one is added up at a time."""
    like = next((parameter.grad for parameter in parameters.values()), None)
    dtype = None if like is None else like.dtype
    room = arrays.empty(max(layer.num_parameters for layer in spec.layers), dtype, like=like)
    found = {}
    for layer in spec.layers:
        start = 0
        for short, shape in layer.parameters.items():
            parameter = parameters[f"{layer.name}/{short}"]
            stop = start + parameter.grad.size
            found[parameter.name] = replace(parameter, grad=room[start:stop].reshape(shape))
            start = stop
    return found


def make_turns(model: Model, plan: Plan, rank: int) -> dict[str, Turns]:
    """Return the groups on this rank, by the name of their last layer."""
    placed = plan.place(model.spec, plan.ranks).layers  # enough samples that nobody goes without
    return {
        group.name: Turns(
            group, placed[group.layers[0].name].needed[rank], placed[group.name].computed[rank], model.parameters
        )
        for group in plan.groups(model.spec)
    }
