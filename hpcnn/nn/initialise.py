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

from hpcnn import rng
from hpcnn.arrays import Array
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
    for layer, own in zip(model.layers, tensors, strict=True):
        for short, shape in layer.parameters.items():
            parameter = parameters[f"{layer.name}/{short}"]
            match short:
                case "weight":
                    stream = rng.generator(seed, f"initialise:{parameter.name}")
                    if parameter.value.shape == shape:
                        _draw(parameter.value, stream, layer, model)
                    else:
                        whole = np.empty(shape, parameter.value.dtype)
                        _draw(whole, stream, layer, model)
                        parameter.value[...] = whole[slices(own[short])]
                case "gamma":
                    parameter.value[...] = 1
                case _:
                    parameter.value[...] = 0


def he_normal(weight: Array, stream: np.random.Generator, fan: int, activation: Activation | None = "relu") -> None:
    """Fill `weight` with normal numbers of variance 2 / ((1 + slope^2) fan)."""
    slope = LEAKY_SLOPE if activation == "leaky_relu" else 0.0
    numbers = stream.standard_normal(weight.size, dtype=np.float32)
    numbers *= np.float32(np.sqrt(2.0 / ((1.0 + slope * slope) * fan)))
    _store(weight, numbers)


def glorot_uniform(weight: Array, stream: np.random.Generator, fan_in: int, fan_out: int) -> None:
    """Fill `weight` with uniform numbers of variance 2 / (fan_in + fan_out)."""
    limit = np.float32(np.sqrt(6.0 / (fan_in + fan_out)))
    numbers = stream.random(weight.size, dtype=np.float32)
    numbers *= 2 * limit
    numbers -= limit
    _store(weight, numbers)


def _draw(weight: Array, stream: np.random.Generator, layer: LayerSpec, model: ModelSpec) -> None:
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


def _store(weight: Array, numbers: np.ndarray) -> None:
    """Copy drawn numbers into a parameter, of whatever type and device it is."""
    numbers = numbers.reshape(weight.shape)
    if isinstance(weight, np.ndarray):
        assign(weight, numbers)
    else:
        weight.set(numbers)
