"""Each kind of layer: gradients by central differences in float64, and what it keeps to itself."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.nn.build import build
from hpcnn.nn.parameter import ParameterSet
from hpcnn.spec import (
    ActivationSpec,
    AddSpec,
    BatchNormSpec,
    ConvSpec,
    DropoutSpec,
    FlattenSpec,
    GlobalAveragePoolSpec,
    LayerSpec,
    LinearSpec,
    PoolSpec,
    ShortcutSpec,
)
from tests.serial import context

N = 3
IMAGE = {"name": "layer", "inputs": ("input",), "input_shape": (5, 4, 4)}
ROW = {"name": "layer", "inputs": ("input",), "input_shape": (6,)}
UNEVEN = ((1, 0), (2, 1))
SPECS = {
    "conv": ConvSpec(**IMAGE, out_channels=3, kernel_size=(3, 2), padding=UNEVEN),
    "conv relu": ConvSpec(**IMAGE, out_channels=3, kernel_size=(3, 3), stride=(2, 1), activation="relu"),
    "conv leaky": ConvSpec(**IMAGE, out_channels=2, kernel_size=(1, 1), bias=False, activation="leaky_relu"),
    "conv groups": ConvSpec(**IMAGE, out_channels=4, kernel_size=(2, 2), dilation=(2, 1), groups=2, padding=UNEVEN),
    "linear": LinearSpec(**ROW, out_features=4),
    "linear relu": LinearSpec(**ROW, out_features=4, activation="relu"),
    "linear without bias": LinearSpec(**ROW, out_features=4, bias=False, activation="leaky_relu"),
    "max pool": PoolSpec(**IMAGE, kind="max", window=(3, 2), stride=(2, 1), padding=((1, 1), (0, 1))),
    "average pool": PoolSpec(**IMAGE, kind="average", window=(3, 2), stride=(2, 1), padding=((1, 1), (0, 1))),
    "global average pool": GlobalAveragePoolSpec(**IMAGE),
    "batchnorm": BatchNormSpec(**IMAGE),
    "batchnorm relu": BatchNormSpec(**IMAGE, activation="relu"),
    "batchnorm leaky": BatchNormSpec(**IMAGE, epsilon=0.1, activation="leaky_relu"),
    "batchnorm of rows": BatchNormSpec(**ROW),
    "relu": ActivationSpec(**IMAGE),
    "leaky relu": ActivationSpec(**ROW, kind="leaky_relu"),
    "add": AddSpec(**IMAGE | {"inputs": ("a", "b")}),
    "add relu": AddSpec(**IMAGE | {"inputs": ("a", "b")}, activation="relu"),
    "dropout": DropoutSpec(**IMAGE, rate=0.4),
    "dropout off": DropoutSpec(**IMAGE, rate=0.0),
    "flatten": FlattenSpec(**IMAGE),
    "shortcut": ShortcutSpec(**IMAGE, out_channels=7, stride=(2, 2)),
    "shortcut in place": ShortcutSpec(**IMAGE, out_channels=4),
}


def make(spec: LayerSpec, seed: int = 0):
    """Return the layer on random float64 parameters, and random inputs that keep clear of kinks."""
    random = np.random.default_rng(seed)
    entries = [(f"{spec.name}/{short}", shape, True) for short, shape in spec.parameters.items()]
    parameters = ParameterSet(entries, np.float64)
    parameters.values[:] = random.normal(size=parameters.values.size)
    inputs = tuple(random.normal(size=(N, *spec.input_shape)) for _ in spec.inputs)
    return build(spec, parameters), parameters, inputs


def numerical_gradient(function, array: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Return the central differences of a scalar function of an array that is changed in place."""
    grad = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = function()
        array[index] = kept - step
        grad[index] = (above - function()) / (2 * step)
        array[index] = kept
    return grad


@pytest.mark.parametrize("kind", SPECS)
def test_gradients_equal_central_differences(kind) -> None:
    layer, parameters, inputs = make(SPECS[kind])
    step = context(N)
    output, saved = layer.forward(inputs, step)
    assert (N, *layer.spec.output_shape) == output.shape
    factor = np.random.default_rng(1).normal(size=output.shape)
    parameters.grads.fill(np.nan)  # gradients are overwritten, never added to
    kept = [array.copy() for array in (*inputs, factor, parameters.values)]

    error = layer.error(factor, saved, step)
    layer.backward_weight(error, saved, step)
    grads = layer.backward_input(error, saved, step)

    for before, after in zip(kept, (*inputs, factor, parameters.values), strict=True):
        np.testing.assert_array_equal(before, after)

    def loss() -> float:
        return float((layer.forward(inputs, step)[0] * factor).sum())

    for array, grad in zip(inputs, grads, strict=True):
        np.testing.assert_allclose(grad, numerical_gradient(loss, array), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(parameters.grads, numerical_gradient(loss, parameters.values), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", SPECS)
def test_evaluation_keeps_no_arrays_for_backward(kind) -> None:
    layer, _, inputs = make(SPECS[kind])
    output, saved = layer.forward(inputs, context(N, training=False))
    assert (N, *layer.spec.output_shape) == output.shape
    assert not any(isinstance(item, np.ndarray) for item in (saved if isinstance(saved, tuple) else (saved,)))


@pytest.mark.parametrize("kind", SPECS)
def test_float32_stays_float32(kind) -> None:
    spec = SPECS[kind]
    parameters = ParameterSet((f"layer/{short}", shape, True) for short, shape in spec.parameters.items())
    layer = build(spec, parameters)
    inputs = tuple(np.ones((N, *spec.input_shape), np.float32) for _ in spec.inputs)
    step = context(N)
    output, saved = layer.forward(inputs, step)
    grads = layer.backward_input(layer.error(output, saved, step), saved, step)
    assert {np.dtype(np.float32)} == {array.dtype for array in (output, *grads, *layer.statistics.values())}


@pytest.mark.parametrize("kind", ["conv relu", "max pool", "average pool", "global average pool", "batchnorm"])
def test_layer_takes_images_of_another_size_than_its_spec(kind) -> None:
    layer, _, _ = make(SPECS[kind])
    x = np.random.default_rng(2).normal(size=(N, 7, 6, 4))
    step = context(N)
    output, saved = layer.forward((x,), step)
    (grad,) = layer.backward_input(layer.error(output, saved, step), saved, step)
    assert x.shape == grad.shape


def test_shortcut_keeps_every_second_pixel_and_appends_zero_channels() -> None:
    layer, _, (x,) = make(SPECS["shortcut"])
    output, _ = layer.forward((x,), context(N))
    np.testing.assert_array_equal(x[:, ::2, ::2], output[..., :4])
    np.testing.assert_array_equal(0, output[..., 4:])


def test_flatten_orders_rows_then_columns_then_channels() -> None:
    layer, _, (x,) = make(SPECS["flatten"])
    output, _ = layer.forward((x,), context(N))
    assert x[1, 2, 3, 1] == output[1, (2 * 4 + 3) * 4 + 1]


def test_dropout_in_evaluation_is_the_identity() -> None:
    layer, _, (x,) = make(SPECS["dropout"])
    np.testing.assert_array_equal(x, layer.forward((x,), context(N, training=False))[0])


def test_dropout_of_a_sample_does_not_depend_on_who_holds_it() -> None:
    layer, _, (x,) = make(SPECS["dropout"])
    whole, _ = layer.forward((x,), context(N))
    part, _ = layer.forward((x[2:],), context(1, samples=np.array([2]), global_batch=N))
    np.testing.assert_array_equal(whole[2:], part)


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 1}, {"samples": np.arange(N) + N}])
def test_dropout_draws_anew_for_another_seed_step_or_sample(change) -> None:
    layer, _, (x,) = make(SPECS["dropout"])
    assert not np.array_equal(layer.forward((x,), context(N))[0], layer.forward((x,), context(N, **change))[0])


def test_dropout_draws_anew_for_another_layer() -> None:
    layer, _, (x,) = make(SPECS["dropout"])
    other, _, _ = make(DropoutSpec(**IMAGE | {"name": "other"}, rate=0.4))
    assert not np.array_equal(layer.forward((x,), context(N))[0], other.forward((x,), context(N))[0])


def test_unknown_kind_of_layer_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="no layer is known for a LayerSpec"):
        build(LayerSpec(**ROW), ParameterSet([]))
