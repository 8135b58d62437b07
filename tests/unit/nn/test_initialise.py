"""Initial weights: their spread, and that nothing but seed and name decides them."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import rng
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.nn.parameter import ParameterSet
from hpcnn.spec import ActivationSpec, ModelSpec


def small(*, extra: bool = False, last: int = 3) -> ModelSpec:
    graph = GraphBuilder("small", (8, 8, 3))
    if extra:
        graph.conv("before", 3, 1)
    graph.conv("conv", 16, 3, activation="relu")
    graph.linear("fc", last)
    return graph.finish(last)


def test_weights_depend_on_seed_and_name_alone() -> None:
    plain, other = Model(small(), 5), Model(small(extra=True, last=4), 5)
    np.testing.assert_array_equal(plain.parameters["conv/weight"].value, other.parameters["conv/weight"].value)
    assert not np.array_equal(plain.parameters["conv/weight"].value, Model(small(), 6).parameters["conv/weight"].value)
    np.testing.assert_array_equal(plain.parameters.values, Model(small(), 5).parameters.values)


def test_a_weight_is_drawn_in_the_order_of_its_axes_wherever_its_numbers_lie() -> None:
    weight = Model(small(), 5).parameters["fc/weight"].value
    stream = rng.generator(5, "initialise:fc/weight")
    limit = np.sqrt(6 / (3 + 6 * 6 * 16))
    expected = limit * (2 * stream.random(weight.size, dtype=np.float32) - 1)
    np.testing.assert_allclose(expected.reshape(3, 6 * 6 * 16), weight, rtol=1e-5, atol=1e-7)


def test_layers_of_one_shape_start_differently() -> None:
    weights = Model(models.build("resnet20", (8, 8, 3), 10), 1).parameters
    assert not np.array_equal(weights["block1_1_conv1/weight"].value, weights["block1_2_conv1/weight"].value)


def test_double_precision_holds_the_same_numbers() -> None:
    single, double = Model(small(), 1), Model(small(), 1, np.float64)
    assert np.float64 == double.parameters.values.dtype
    np.testing.assert_array_equal(single.parameters.values, double.parameters.values)


def assert_normal(weight: np.ndarray, variance: float) -> None:
    tolerance = 4 * np.sqrt(2 / weight.size)  # four standard deviations of a sample variance
    assert float(weight.var()) / variance == pytest.approx(1.0, abs=tolerance)
    assert abs(weight.mean()) < 4 * np.sqrt(variance / weight.size)
    assert float((weight**4).mean()) / float(weight.var()) ** 2 == pytest.approx(3.0, abs=0.3)


def assert_uniform(weight: np.ndarray, limit: float) -> None:
    assert 0.95 * limit < weight.max() <= limit
    assert -limit <= weight.min() < -0.95 * limit
    assert float(weight.var()) / (limit**2 / 3) == pytest.approx(1.0, abs=4 * np.sqrt(0.8 / weight.size))


def test_convolution_before_relu_starts_as_he_normal_over_fan_in() -> None:
    weights = Model(models.build("vgg11-32", (32, 32, 3), 10), 1).parameters
    assert_normal(weights["conv2_1/weight"].value, 2 / (9 * 64))
    assert_normal(weights["conv4_1/weight"].value, 2 / (9 * 256))


def test_convolution_before_batchnorm_starts_as_he_normal_over_fan_out() -> None:
    weights = Model(models.build("resnet20", (32, 32, 3), 10), 1).parameters
    assert_normal(weights["block3_1_conv1/weight"].value, 2 / (9 * 64))  # fan-in would be 9 * 32


def test_leaky_relu_lowers_the_gain() -> None:
    weights = Model(models.build("yolo16", (64, 64, 3), 10), 1).parameters
    assert_normal(weights["conv11/weight"].value, 2 / (1 + 0.01) / (9 * 512))


def test_separate_activation_counts_like_a_fused_one() -> None:
    fused = small()
    conv, *rest = fused.layers
    plain = type(conv)(**(vars(conv) | {"activation": None}))
    relu = ActivationSpec(name="relu", inputs=("conv",), input_shape=conv.output_shape)
    flatten = type(rest[0])(**(vars(rest[0]) | {"inputs": ("relu",)}))
    apart = ModelSpec(name="apart", input_shape=(8, 8, 3), num_classes=3, layers=(plain, relu, flatten, *rest[1:]))
    np.testing.assert_array_equal(Model(fused, 1).parameters.values, Model(apart, 1).parameters.values)


def test_classifiers_and_lenet_start_as_glorot_uniform() -> None:
    weights = Model(models.build("vgg11-32", (32, 32, 3), 100), 1).parameters
    assert_uniform(weights["fc1/weight"].value, np.sqrt(6 / (512 + 100)))
    weights = Model(models.build("lenet5", (28, 28, 1), 10), 1).parameters
    assert_uniform(weights["conv2/weight"].value, np.sqrt(6 / (25 * 6 + 25 * 16)))
    assert_uniform(weights["fc1/weight"].value, np.sqrt(6 / (400 + 120)))


def test_biases_start_at_zero_and_batchnorm_at_identity() -> None:
    model = Model(models.build("resnet20", (8, 8, 3), 10), 1)
    for parameter in model.parameters.parameters:
        short = parameter.name.split("/")[1]
        if short != "weight":
            np.testing.assert_array_equal(float(short == "gamma"), parameter.value)
    for name, array in model.statistics.items():
        np.testing.assert_array_equal(float(name.endswith("var")), array)


def test_every_weight_is_drawn() -> None:
    spec = models.build("resnet20", (32, 32, 3), 10)
    parameters = Model(spec, 1).parameters
    assert [p.name for p in ParameterSet.of(spec.layers).parameters] == [p.name for p in parameters.parameters]
    assert all(np.count_nonzero(p.value) > 0.99 * p.value.size for p in parameters.parameters if p.decay)
