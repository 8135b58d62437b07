"""Averages by direction and length, against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.nn.parameter import ParameterSet
from hpcnn.train.rules import directions

SHAPES = {"conv/weight": (4, 3, 3, 2), "conv/bias": (4,), "fc/weight": (5, 7), "fc/bias": (5,)}


def replica(seed: int, dtype: type = np.float32) -> ParameterSet:
    made = ParameterSet([(name, shape, name.endswith("weight")) for name, shape in SHAPES.items()], dtype)
    made.values[...] = np.random.default_rng(seed).standard_normal(made.values.size)
    return made


def average(replicas: list[ParameterSet], weights: list[float]) -> ParameterSet:
    """Return the first replica after all have been averaged, with sums made here."""
    lengths = sum(directions.part(one, weight) for one, weight in zip(replicas, weights, strict=True))
    total = replicas[0]
    total.values[...] = np.sum([one.values for one in replicas], axis=0)
    directions.join(total, lengths)
    return total


def by_formula(tensors: list[np.ndarray], weights: list[float], is_weight: bool) -> np.ndarray:
    if not is_weight:
        return np.sum([a * w for a, w in zip(weights, tensors, strict=True)], axis=0)
    result = np.zeros_like(tensors[0])
    for row in range(len(result)):
        rows = [tensor[row].ravel() for tensor in tensors]
        direction = sum(a * w / np.linalg.norm(w) for a, w in zip(weights, rows, strict=True))
        length = sum(a * np.linalg.norm(w) for a, w in zip(weights, rows, strict=True))
        result[row] = (length * direction / np.linalg.norm(direction)).reshape(result[row].shape)
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_an_average_is_that_of_the_formula(dtype, tolerance):
    weights = [0.5, 0.375, 0.125]
    replicas = [replica(seed, dtype) for seed in range(3)]
    before = [{p.name: p.value.astype(np.float64) for p in one.parameters} for one in replicas]
    found = average(replicas, weights)
    for name in SHAPES:
        expected = by_formula([one[name] for one in before], weights, name.endswith("weight"))
        np.testing.assert_allclose(found[name].value, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_filters_that_disagree_keep_their_length_where_a_plain_average_is_shorter():
    weights = [0.5, 0.5]
    replicas = [replica(seed) for seed in range(2)]
    rows = [one["fc/weight"].value.copy() for one in replicas]
    lengths = np.mean([np.linalg.norm(one, axis=1) for one in rows], axis=0)
    assert (np.linalg.norm(np.mean(rows, axis=0), axis=1) < 0.95 * lengths).all()
    found = average(replicas, weights)
    np.testing.assert_allclose(np.linalg.norm(found["fc/weight"].value, axis=1), lengths, rtol=1e-6)


def test_filters_without_length_or_that_cancel_become_zero():
    one, other = replica(1), replica(2)
    one["fc/weight"].value[0] = other["fc/weight"].value[0] = 0
    one["fc/weight"].value[1] = 1
    other["fc/weight"].value[1] = -1
    found = average([one, other], [0.5, 0.5])["fc/weight"].value
    assert not found[:2].any()
    assert np.isfinite(found).all()
    assert found[2:].any()
