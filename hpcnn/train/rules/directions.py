"""Averages of filters and neurons by direction and length.

Of replicas w_k with weights a_k, the average of each filter (each row of a fully connected weight) is

    u = sum a_k w_k / |w_k|,   w = (sum a_k |w_k|) u / |u|

so that it is as long as they are in the mean, however much their directions differ: their plain average is shorter.
The split into direction and length is that of weight normalisation (Salimans, Kingma, arXiv:1602.07868). What has no
length, or whose directions cancel, becomes zero. Biases and norm parameters are averaged as they are.

Between `part` and `join` the flat vectors of all replicas, and the lengths, are to be summed.
"""

from __future__ import annotations

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.nn.parameter import Parameter, ParameterSet


def part(parameters: ParameterSet, weight: float) -> np.ndarray:
    """Replace filters by their weighted directions, all else by its weighted value; return the weighted lengths.

    Returns
    -------
    ndarray of float64, shape (number of filters in all,)
    """
    lengths = [np.empty(0)]
    for parameter in parameters.parameters:
        value = parameter.value
        if not parameter.decay:
            value *= value.dtype.type(weight)
            continue
        norms = _norms(value)
        _scale(value, np.divide(weight, norms, out=np.zeros_like(norms), where=norms > 0))
        lengths.append(weight * norms)
    return np.concatenate(lengths)


def join(parameters: ParameterSet, lengths: np.ndarray) -> None:
    """Give the summed directions the summed lengths."""
    start = 0
    for parameter in _filters(parameters):
        value = parameter.value
        norms = _norms(value)
        wanted = lengths[start : start + len(norms)]
        start += len(norms)
        _scale(value, np.divide(wanted, norms, out=np.zeros_like(norms), where=norms > 0))


def _filters(parameters: ParameterSet) -> list[Parameter]:
    return [parameter for parameter in parameters.parameters if parameter.decay]


def _norms(value: Array) -> np.ndarray:
    """Return the length of every filter, float64 on the host."""
    squares = (value.astype(np.float64) ** 2).sum(axis=tuple(range(1, value.ndim)))
    return np.sqrt(arrays.to_host(squares))


def _scale(value: Array, factors: np.ndarray) -> None:
    """Multiply every filter by its factor, in place."""
    shape = (-1, *[1] * (value.ndim - 1))
    value *= arrays.to_device(factors.astype(value.dtype), value).reshape(shape)
