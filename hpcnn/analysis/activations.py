"""Outputs and errors of layers, collected from a program under any plan: each rank gets some channels of all samples.

Distances between samples are sums over features, so channels can be worked on apart, whatever the plan has cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm.movement import Mover, prepare
from hpcnn.errors import PlanError
from hpcnn.geometry import Block, blocks
from hpcnn.parallel.program import Program
from hpcnn.parallel.turns import Turns
from hpcnn.parallel.widen import cast
from hpcnn.plan.layout import Box, within
from hpcnn.plan.movement import Movement
from hpcnn.plan.placement import Placed
from hpcnn.spec import BatchNormSpec, DropoutSpec, LayerSpec


class Activations:
    """A `Watch` that brings what it sees to where it is worked on (collective to make).

    Parameters
    ----------
    program : Program
        Runs the model.
    layers : sequence of LayerSpec
        Whose outputs and errors are wanted.
    samples : ndarray of int, shape (N,)
        Indices of the images in their data set.
    errors : bool
        Whether to run backward as well. Then, where the model has batch norms or dropout, outputs come from a pass of
        evaluation and errors from one of training, with the statistics of these N samples.

    Raises
    ------
    PlanError
        If the plan leaves no rank with a value that is wanted.
    """

    def __init__(self, program: Program, layers: Sequence[LayerSpec], samples: np.ndarray, *, errors: bool) -> None:
        self._program, self._samples, self._layers, self._errors = program, samples, layers, errors
        plain = not any(isinstance(layer, BatchNormSpec | DropoutSpec) for layer in program.model.spec.layers)
        self._passes = ([True] if plain else [False, True]) if errors else [False]
        placed = program.plan.place(program.model.spec, len(samples)).layers
        _refuse(program, layers, placed, errors=errors)
        self._outputs = {layer.name: _Passage(program, layer, placed[layer.name], "output") for layer in layers}
        backward = layers if errors else ()
        self._backward = {layer.name: _Passage(program, layer, placed[layer.name], "error") for layer in backward}
        self._sees = False

    def collect(self, images: np.ndarray, labels: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return this rank's channels of all outputs and errors, (N, H, W, c) or (N, f) each (collective).

        Parameters
        ----------
        images, labels : ndarray
            This rank's part of the samples.
        """
        for number, training in enumerate(self._passes):
            self._sees = number == 0
            context = self._program.context(
                training=training, seed=0, step=0, samples=self._samples, global_batch=len(self._samples)
            )
            self._program.probe(images, labels, context, self)
        return [[passage.end() for passage in some.values()] for some in (self._outputs, self._backward)]  # type: ignore[return-value]

    def output(self, layer: str, value: Array) -> None:
        """See `Watch`."""
        if self._sees and layer in self._outputs:
            self._outputs[layer].begin(value)

    def error(self, layer: str, value: Array) -> None:
        """See `Watch`."""
        if layer in self._backward:
            self._backward[layer].begin(value)


class _Passage:
    """The way of one value from its owners to the ranks that work on its channels."""

    def __init__(self, program: Program, layer: LayerSpec, placed: Placed, what: str) -> None:
        world, kind = program.world, program.model.activation
        self._place = within(placed.owned[world.rank], placed.computed[world.rank])
        self._dtype = kind if kind.itemsize >= 4 else np.dtype(np.float32)
        self._mover: Mover | None = None
        if world.size > 1:
            *others, channels = layer.output_shape
            samples = max(box[0].stop for box in placed.owned)
            full = (Block(0, samples), *(Block(0, size) for size in others))
            target: tuple[Box, ...] = tuple((*full, own) for own in blocks(channels, world.size))
            label = f"{what} of {layer.name} to analyse"
            self._mover = prepare(world.engine, Movement(placed.owned, target), self._dtype, label=label)
        self._value: np.ndarray | None = None

    def begin(self, value: Array) -> None:
        self._value = np.asarray(arrays.to_host(cast(value[self._place], self._dtype)))
        if self._mover is not None:
            self._mover.start(self._value)

    def end(self) -> np.ndarray:
        value, self._value = self._value, None
        assert value is not None, "the program has shown every value"
        return value if self._mover is None else np.asarray(self._mover.finish(value))


def _refuse(program: Program, layers: Sequence[LayerSpec], placed: Mapping[str, Placed], *, errors: bool) -> None:
    """Raise PlanError if an output is never whole, or an error is a sum that stays in parts."""
    made = {operation.output: operation.layer for operation in program.operations}
    for layer in layers:
        if layer.name not in made or (errors and isinstance(made[layer.name], Turns)):
            raise PlanError(
                f"analysis: layer '{layer.name}' is computed tile after tile and never there as a whole; only whole"
                " layers can be measured. Set plan.turns = [1, 1], or leave it out of analysis.layers."
            )
        place = placed[layer.name]
        if errors and (place.returned != place.owned or place.made_back != place.returned):
            raise PlanError(
                f"analysis: under this plan the error of layer '{layer.name}' stays in parts, on several ranks, whose"
                " sum no rank has; it cannot be measured. Set analysis.errors = false, or another plan."
            )
