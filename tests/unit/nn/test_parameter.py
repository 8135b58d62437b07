"""Parameters are views into two flat buffers."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.errors import ShapeError
from hpcnn.nn import models
from hpcnn.nn.parameter import ParameterSet

ENTRIES = [("a/weight", (3, 2), True), ("a/bias", (3,), False), ("b/weight", (2, 1, 1, 3), True)]


def test_views_follow_one_another_in_the_flat_buffers() -> None:
    parameters = ParameterSet(ENTRIES)
    parameters.values[:] = np.arange(15)
    parameters.grads[:] = -np.arange(15)
    assert parameters.offsets == {"a/weight": (0, 6), "a/bias": (6, 9), "b/weight": (9, 15)}
    assert [name for name, _, _ in ENTRIES] == [parameter.name for parameter in parameters.parameters]
    for (name, shape, decay), (start, stop) in zip(ENTRIES, parameters.offsets.values(), strict=True):
        parameter = parameters[name]
        assert (shape, decay) == (parameter.value.shape, parameter.decay)
        np.testing.assert_array_equal(np.arange(start, stop), parameter.value.ravel())
        np.testing.assert_array_equal(-np.arange(start, stop), parameter.grad.ravel())


def test_writing_a_view_writes_the_buffer() -> None:
    parameters = ParameterSet(ENTRIES)
    parameters["a/bias"].value[...] = 7
    parameters["b/weight"].grad[...] = 5
    np.testing.assert_array_equal([0] * 6 + [7] * 3 + [0] * 6, parameters.values)
    np.testing.assert_array_equal([0] * 9 + [5] * 6, parameters.grads)


def test_buffers_have_the_type_asked_for() -> None:
    assert np.float32 == ParameterSet(ENTRIES).values.dtype
    assert np.float64 == ParameterSet(ENTRIES, np.float64).grads.dtype


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ShapeError, match="two tensors are named 'a/bias'"):
        ParameterSet([*ENTRIES, ("a/bias", (1,), False)])


def test_only_weights_decay() -> None:
    parameters = ParameterSet.of(models.build("resnet20", (8, 8, 3), 10))
    decaying = {parameter.name.split("/")[1] for parameter in parameters.parameters if parameter.decay}
    exempt = {parameter.name.split("/")[1] for parameter in parameters.parameters if not parameter.decay}
    assert {"weight"} == decaying
    assert {"bias", "gamma", "beta"} == exempt


def test_a_model_without_parameters_has_empty_buffers() -> None:
    assert (ParameterSet([]).values.size, ParameterSet([]).parameters) == (0, [])
