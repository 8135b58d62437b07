"""Initial values of the parameters: drawn as global tensors keyed by name, so that every split starts alike.

Rules, by what a weight feeds:

- an activation: He normal over fan-in, standard deviation sqrt(2 / ((1 + slope^2) fan_in));
- a batch norm: He normal over fan-out, as residual nets are started;
- anything else (logits, sums): Glorot uniform, within sqrt(6 / (fan_in + fan_out)).

A model whose `initial_weights` is "glorot" (LeNet-5) uses the last rule everywhere. Biases and beta start at 0,
gamma at 1.

References
----------
Glorot, Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010.
He, Zhang, Ren, Sun, "Delving deep into rectifiers", arXiv:1502.01852.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hpcnn import arrays, rng
from hpcnn.geometry import Block, slices
from hpcnn.nn.parameter import ParameterSet, assign
from hpcnn.ops import LEAKY_SLOPE
from hpcnn.spec import Activation, ActivationSpec, BatchNormSpec, LayerSpec, ModelSpec


def initialise(
    model: ModelSpec, parameters: ParameterSet, seed: int, tensors: Sequence[Mapping[str, tuple[Block, ...]]]
) -> None:
    """Overwrite all parameters of `model` with their initial values.

    Parameters
    ----------
    parameters : ParameterSet
        With what this rank has of each tensor.
    tensors : sequence of dict of str to tuple of Block
        Where that lies in the whole one, layer by layer and by short name.
    """
    on_host = arrays.on_host(parameters.values)
    flat = parameters.values if on_host else arrays.empty(parameters.values.shape, parameters.values.dtype)
    for layer, own in zip(model.layers, tensors, strict=True):
        for short, shape in layer.parameters.items():
            name = f"{layer.name}/{short}"
            value = parameters.view(flat, name)
            match short:
                case "weight":
                    stream = rng.generator(seed, f"initialise:{name}")
                    if value.shape == shape:
                        _draw(value, stream, layer, model)
                    else:
                        whole = np.empty(shape, value.dtype)
                        _draw(whole, stream, layer, model)
                        value[...] = whole[slices(own[short])]
                case "gamma":
                    value[...] = 1
                case _:
                    value[...] = 0
    if not on_host:
        arrays.overwrite(parameters.values, flat)


def he_normal(
    weight: np.ndarray, stream: np.random.Generator, fan: int, activation: Activation | None = "relu"
) -> None:
    """Fill `weight` with normal numbers of variance 2 / ((1 + slope^2) fan)."""
    slope = LEAKY_SLOPE if activation == "leaky_relu" else 0.0
    numbers = stream.standard_normal(weight.size, dtype=np.float32)
    numbers *= np.float32(np.sqrt(2.0 / ((1.0 + slope * slope) * fan)))
    _store(weight, numbers)


def glorot_uniform(weight: np.ndarray, stream: np.random.Generator, fan_in: int, fan_out: int) -> None:
    """Fill `weight` with uniform numbers of variance 2 / (fan_in + fan_out)."""
    limit = np.float32(np.sqrt(6.0 / (fan_in + fan_out)))
    numbers = stream.random(weight.size, dtype=np.float32)
    numbers *= 2 * limit
    numbers -= limit
    _store(weight, numbers)


def _draw(weight: np.ndarray, stream: np.random.Generator, layer: LayerSpec, model: ModelSpec) -> None:
    fan_in, fan_out = layer.fan
    activation, normalised = _what_follows(layer, model)
    if model.initial_weights == "glorot" or not (activation or normalised):
        glorot_uniform(weight, stream, fan_in, fan_out)
    else:
        he_normal(weight, stream, fan_out if normalised else fan_in, activation)


def _what_follows(layer: LayerSpec, model: ModelSpec) -> tuple[Activation | None, bool]:
    """Return the activation that sees the layer's output next, and whether a batch norm stands before it."""
    activation: Activation | None = getattr(layer, "activation", None)
    if activation:
        return activation, False
    for reader in model.layers:
        if layer.name in reader.inputs:
            match reader:
                case BatchNormSpec():
                    return reader.activation, True
                case ActivationSpec():
                    return reader.kind, False
    return None, False


def _store(weight: np.ndarray, numbers: np.ndarray) -> None:
    """Copy drawn numbers into a parameter, of whatever type it is."""
    assign(weight, numbers.reshape(weight.shape))
