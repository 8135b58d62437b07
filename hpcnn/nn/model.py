"""A model with its numbers: parameters, statistics and layers. `parallel/program.py` runs it."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcnn.nn.build import build
from hpcnn.nn.initialise import initialise
from hpcnn.nn.layer import Layer
from hpcnn.nn.parameter import ParameterSet
from hpcnn.spec import ModelSpec


class Model:
    """Layers of a model on one set of parameters, drawn from `seed`.

    Parameters
    ----------
    spec : ModelSpec
        The layers, in the order in which they run.
    seed : int
        Key of the initial weights: equal on every rank, whatever their number.
    dtype : data type
        float32 to train; float64 serves gradient checks.

    Attributes
    ----------
    parameters : ParameterSet
        All trained tensors.
    layers : list of Layer
        In the order of `spec.layers`.
    statistics : dict of str to numpy.ndarray
        What is saved beside the parameters, as "<layer>/<short name>"; the arrays are the layers' own.
    """

    def __init__(self, spec: ModelSpec, seed: int, dtype: Any = np.float32) -> None:
        self.spec = spec
        self.parameters = ParameterSet.of(spec, dtype)
        initialise(spec, self.parameters, seed)
        self.layers: list[Layer] = [build(layer, self.parameters) for layer in spec.layers]
        self.statistics: dict[str, np.ndarray] = {
            f"{layer.spec.name}/{short}": array for layer in self.layers for short, array in layer.statistics.items()
        }
