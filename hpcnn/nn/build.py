"""From what a layer is (spec) to the layer that computes it."""

from __future__ import annotations

from hpcnn.nn.batchnorm import BatchNorm
from hpcnn.nn.conv import Conv
from hpcnn.nn.layer import Layer
from hpcnn.nn.linear import Linear
from hpcnn.nn.parameter import ParameterSet
from hpcnn.nn.partial import PartialSum
from hpcnn.nn.pointwise import Activation, Add, Dropout, Flatten, Shortcut
from hpcnn.nn.pool import AveragePool, GlobalAveragePool, MaxPool
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
    PartialSumSpec,
    PoolSpec,
    ShortcutSpec,
)


def build(spec: LayerSpec, parameters: ParameterSet) -> Layer:
    """Return the layer that `spec` describes, on its part of `parameters`."""
    match spec:
        case ConvSpec():
            return Conv(spec, parameters)
        case LinearSpec():
            return Linear(spec, parameters)
        case PartialSumSpec():
            return PartialSum(spec, parameters)
        case PoolSpec(kind="max"):
            return MaxPool(spec, parameters)
        case PoolSpec():
            return AveragePool(spec, parameters)
        case GlobalAveragePoolSpec():
            return GlobalAveragePool(spec, parameters)
        case BatchNormSpec():
            return BatchNorm(spec, parameters)
        case ActivationSpec():
            return Activation(spec, parameters)
        case AddSpec():
            return Add(spec, parameters)
        case DropoutSpec():
            return Dropout(spec, parameters)
        case FlattenSpec():
            return Flatten(spec, parameters)
        case ShortcutSpec():
            return Shortcut(spec, parameters)
    raise TypeError(f"{spec.name}: no layer is known for a {type(spec).__name__}")
