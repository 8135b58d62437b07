"""A model with its numbers: parameters, statistics and layers. `parallel/program.py` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Place
from hpcnn.nn.build import build
from hpcnn.nn.initialise import initialise
from hpcnn.nn.layer import Layer
from hpcnn.nn.parameter import ParameterSet
from hpcnn.spec import ModelSpec, Part, whole


class Model:
    """Layers of a model on one set of parameters, drawn from `seed`.

    Parameters
    ----------
    spec : ModelSpec
        The layers, in the order in which they run.
    seed : int
        Key of the initial weights: equal on every rank, whatever their number.
    dtype : data type
        Of parameters: float32 to train; float64 serves gradient checks.
    parts : sequence of Part, optional
        What this rank has of every layer; left out, all.
    activation : data type, optional
        Of what the layers make, and its gradients; left out, that of the parameters.
    place : str
        Where parameters, and so everything else, live.

    Attributes
    ----------
    parameters : ParameterSet
        All trained tensors.
    parts : tuple of Part
        What this rank has of every layer.
    activation : data type
        Of what the layers make.
    layers : list of Layer
        In the order of `spec.layers`.
    statistics : dict of str to Array
        What is saved beside the parameters, as "<layer>/<short name>"; the arrays are the layers' own.
    """

    def __init__(
        self,
        spec: ModelSpec,
        seed: int,
        dtype: Any = np.float32,
        parts: Sequence[Part] | None = None,
        *,
        activation: Any = None,
        place: Place = "cpu",
    ) -> None:
        parts = [whole(layer) for layer in spec.layers] if parts is None else parts
        self.spec = spec
        self.parts = tuple(parts)
        self.activation: np.dtype[Any] = np.dtype(dtype if activation is None else activation)
        self.parameters = ParameterSet.of([part.spec for part in parts], dtype, place)
        initialise(spec, self.parameters, seed, [part.tensors for part in parts])
        self.layers: list[Layer] = [build(part.spec, self.parameters) for part in parts]
        for layer, part in zip(self.layers, parts, strict=True):
            layer.box = part.box
        self.statistics: dict[str, Array] = {
            f"{layer.spec.name}/{short}": array for layer in self.layers for short, array in layer.statistics.items()
        }
