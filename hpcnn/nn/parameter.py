"""Trained tensors: views into two flat buffers, one of values and one of gradients, in layer order.

Exchanges and optimizers work on stretches of the flat buffers, layers on the views.
Parameter gradients are overwritten once per step (the `out=` of `ops`), never zeroed or added to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array, Shape
from hpcnn.errors import ShapeError
from hpcnn.spec import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """One trained tensor.

    `name` is "<layer>/<short name>", such as "conv1/weight"; `value` and `grad` are views into the flat buffers of the
    `ParameterSet`; `decay` tells whether weight decay applies (weights) or not (biases and norm parameters).
    """

    name: str
    value: Array
    grad: Array
    decay: bool


class ParameterSet:
    """All trained tensors of a model.

    Parameters
    ----------
    entries : iterable of (name, shape, decay)
        In layer order, which is the order of the buffers.
    dtype : data type
        float32 to train; float64 serves gradient checks.

    Attributes
    ----------
    values, grads : Array, shape (count,)
        The flat buffers. Both start as zeros.
    parameters : list of Parameter
        In the order of the buffers.
    offsets : dict of name to (start, stop)
        Where each parameter lies in the flat buffers.

    Raises
    ------
    ShapeError
        If two entries have one name.
    """

    def __init__(self, entries: Iterable[tuple[str, Shape, bool]], dtype: Any = np.float32) -> None:
        entries = list(entries)
        count = sum(prod(shape) for _, shape, _ in entries)
        self.values: Array = arrays.empty(count, dtype)
        self.grads: Array = arrays.empty(count, dtype)
        self.values.fill(0)
        self.grads.fill(0)
        self.parameters: list[Parameter] = []
        self.offsets: dict[str, tuple[int, int]] = {}
        start = 0
        for name, shape, decay in entries:
            if name in self.offsets:
                raise ShapeError(f"parameters: two tensors are named '{name}'; names must differ.")
            stop = start + prod(shape)
            value, grad = (buffer[start:stop].reshape(shape) for buffer in (self.values, self.grads))
            self.parameters.append(Parameter(name, value, grad, decay))
            self.offsets[name] = (start, stop)
            start = stop
        self._by_name = {parameter.name: parameter for parameter in self.parameters}

    @classmethod
    def of(cls, model: ModelSpec, dtype: Any = np.float32) -> ParameterSet:
        """Return the parameters, all zero, of a model; weights decay, biases and norm parameters do not."""
        return cls(
            (
                (f"{layer.name}/{short}", shape, short == "weight")
                for layer in model.layers
                for short, shape in layer.parameters.items()
            ),
            dtype,
        )

    def __getitem__(self, name: str) -> Parameter:
        """Return the parameter "<layer>/<short name>"."""
        return self._by_name[name]
