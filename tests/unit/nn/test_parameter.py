"""Parameters are views into two flat buffers."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.errors import ShapeError
from hpcnn.nn import models
from hpcnn.nn.parameter import ParameterSet, assign

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
        order = "F" if len(shape) == 2 else "C"
        np.testing.assert_array_equal(np.arange(start, stop), parameter.value.ravel(order))
        np.testing.assert_array_equal(-np.arange(start, stop), parameter.grad.ravel(order))


def test_weights_of_a_range_of_input_features_are_one_stretch() -> None:
    parameters = ParameterSet.of(models.build("lenet5", (28, 28, 1), 10).layers)
    parameters.values[:] = np.random.default_rng(0).normal(size=parameters.values.size)
    weight, (start, stop) = parameters["fc1/weight"].value, parameters.offsets["fc1/weight"]
    outputs, inputs = weight.shape
    assert (outputs, inputs) == (120, 400)
    for first, last in ((0, 1), (133, 266), (399, 400), (0, 400)):
        stretch = parameters.values[start + first * outputs : start + last * outputs]
        np.testing.assert_array_equal(weight[:, first:last], stretch.reshape(-1, outputs).T)
        assert np.shares_memory(weight[:, first:last], stretch)
    assert stop == start + inputs * outputs


def test_filters_lie_in_the_order_of_their_axes() -> None:
    parameters = ParameterSet.of(models.build("lenet5", (28, 28, 1), 10).layers)
    parameters.values[:] = np.arange(parameters.values.size)
    start, stop = parameters.offsets["conv2/weight"]
    filters = parameters["conv2/weight"].value
    assert filters.flags.c_contiguous
    np.testing.assert_array_equal(np.arange(start, stop), filters.ravel())


def test_any_array_laid_out_as_the_parameters_can_be_viewed_in_their_shapes() -> None:
    parameters = ParameterSet(ENTRIES)
    parameters.values[:] = np.arange(15)
    state = 2.0 * parameters.values.astype(np.float64)
    for parameter in parameters.parameters:
        view = parameters.view(state, parameter.name)
        np.testing.assert_array_equal(2 * parameter.value, view)
        view[...] = -1
    np.testing.assert_array_equal(np.full(15, -1.0), state)


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (63, 130), (200, 3), (1, 77)])
@pytest.mark.parametrize("orders", ["CF", "FC", "CC", "FF"])
def test_numbers_are_copied_from_either_order_to_either(shape: tuple[int, int], orders: str) -> None:
    source = np.asarray(np.random.default_rng(1).normal(size=shape), order=orders[0])
    target = np.full(shape, np.nan, np.float32, order=orders[1])
    assign(target, source)
    np.testing.assert_array_equal(source.astype(np.float32), target)


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
    parameters = ParameterSet.of(models.build("resnet20", (8, 8, 3), 10).layers)
    decaying = {parameter.name.split("/")[1] for parameter in parameters.parameters if parameter.decay}
    exempt = {parameter.name.split("/")[1] for parameter in parameters.parameters if not parameter.decay}
    assert {"weight"} == decaying
    assert {"bias", "gamma", "beta"} == exempt


def test_a_model_without_parameters_has_empty_buffers() -> None:
    assert (ParameterSet([]).values.size, ParameterSet([]).parameters) == (0, [])
