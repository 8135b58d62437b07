"""Trained tensors: views into two flat buffers, one of values and one of gradients, in layer order.

Exchanges and optimizers work on stretches of the flat buffers, layers on the views. A tensor lies in the order of its
axes, but a matrix, the weight (out, in) of a fully connected layer, lies transposed: the weights of a range of input
features are then one stretch, which a rank may own, reduce or send as it lies.
Parameter gradients are overwritten once per step (the `out=` of `ops`), never zeroed or added to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array, Place, Shape
from hpcnn.errors import ShapeError
from hpcnn.spec import LayerSpec

TILE = 64
"""Rows and columns of a tile of `assign`: one of float32 and its copy fill a first-level cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """One trained tensor.

    `name` is "<layer>/<short name>", such as "conv1/weight"; `value` and `grad` are views into the flat buffers of the
    `ParameterSet`, Fortran-ordered where they are matrices; `decay` tells whether weight decay applies (weights) or not
    (biases and norm parameters).
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
    place : str
        Where the buffers live.

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

    def __init__(
        self, entries: Iterable[tuple[str, Shape, bool]], dtype: Any = np.float32, place: Place = "cpu"
    ) -> None:
        entries = list(entries)
        count = sum(prod(shape) for _, shape, _ in entries)
        self.values: Array = arrays.zeros(count, dtype, place=place)
        self.grads: Array = arrays.zeros(count, dtype, place=place)
        self.parameters: list[Parameter] = []
        self.offsets: dict[str, tuple[int, int]] = {}
        self._shapes: dict[str, Shape] = {}
        start = 0
        for name, shape, decay in entries:
            if name in self.offsets:
                raise ShapeError(f"parameters: two tensors are named '{name}'; names must differ.")
            stop = start + prod(shape)
            self.offsets[name], self._shapes[name] = (start, stop), shape
            self.parameters.append(Parameter(name, self.view(self.values, name), self.view(self.grads, name), decay))
            start = stop
        self._by_name = {parameter.name: parameter for parameter in self.parameters}

    @classmethod
    def of(cls, layers: Iterable[LayerSpec], dtype: Any = np.float32, place: Place = "cpu") -> ParameterSet:
        """Return the parameters, all zero, of layers; weights decay, biases and norm parameters do not."""
        return cls(
            (
                (f"{layer.name}/{short}", shape, short == "weight")
                for layer in layers
                for short, shape in layer.parameters.items()
            ),
            dtype,
            place,
        )

    def view(self, flat: Array, name: str) -> Array:
        """Return one parameter's part of an array that is laid out as the flat buffers, in the parameter's shape.

        Parameters
        ----------
        flat : Array, shape (count,)
            Values, gradients, or anything kept per trained number, such as the state of an optimizer.
        name : str
            "<layer>/<short name>".
        """
        part, shape = flat[slice(*self.offsets[name])], self._shapes[name]
        return part.reshape(shape[::-1]).T if len(shape) == 2 else part.reshape(shape)

    def __getitem__(self, name: str) -> Parameter:
        """Return the parameter "<layer>/<short name>"."""
        return self._by_name[name]


def assign(target: Array, source: Array) -> None:
    """Copy numbers into or out of a parameter, whatever the two memory orders.

    From one order of a matrix to the other it goes by tiles: element by element in either order touches a new cache
    line, and often a new page, for each number, which is five times slower on the largest layers.
    """
    if target.ndim != 2 or target.flags.c_contiguous == source.flags.c_contiguous:
        target[...] = source
        return
    for row in range(0, target.shape[0], TILE):
        for column in range(0, target.shape[1], TILE):
            tile = slice(row, row + TILE), slice(column, column + TILE)
            target[tile] = source[tile]
