"""The contract between a layer and the program that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from hpcnn import arrays
from hpcnn.arrays import Array, Shape
from hpcnn.geometry import Block
from hpcnn.nn.context import StepContext
from hpcnn.nn.parameter import Parameter, ParameterSet
from hpcnn.spec import LayerSpec

Saved: TypeAlias = Any
S = TypeVar("S", bound=LayerSpec)


@dataclass(frozen=True)
class Narrow:
    """How what a layer saved of a box of its output is cut down to a box within."""

    inputs: tuple[Callable[[Array], Array], ...]
    """Cuts each input that is saved."""
    output: Callable[[Array], Array]
    """Cuts the output if that is saved."""
    own: Callable[[Array], Array]
    """Cuts an array that only the layer has, an element for each of the output's."""
    input_shape: Shape
    """Of what is read of each input."""


class Layer(Generic[S]):
    """A layer: its spec, its parameters, and four functions that the program calls in this order.

    `forward`; then, on the way back, `error`, `backward_weight`, `backward_input`. None of them modifies its arguments.
    The gradients that `backward_input` returns may be the array it was given: whoever sums gradients of several
    readers makes a new array. `backward_input` may be skipped where nobody wants the result (a layer that reads only
    the images), unless `joint_backward` is set.

    Attributes
    ----------
    spec : LayerSpec
        What the layer is.
    parameters : dict of str to Parameter
        By short name ("weight", "bias").
    statistics : dict of str to Array
        Kept and saved, not trained by gradient; by short name. They start as zeros.
    joint_backward : bool
        Whether `backward_input` yields the parameters' gradients too, so that it must run for every layer and
        gradients are complete only after it. Such a layer also runs on no samples at all: its sums are everybody's.
    box : tuple of Block
        Where what this rank computes lies in one sample's output; None: it is all of it.
    """

    joint_backward = False
    box: tuple[Block, ...] | None = None

    def __init__(self, spec: S, parameters: ParameterSet) -> None:
        self.spec = spec
        self.parameters: dict[str, Parameter] = {short: parameters[f"{spec.name}/{short}"] for short in spec.parameters}
        self.statistics: dict[str, Array] = {
            short: arrays.zeros(shape, parameters.values.dtype, like=parameters.values)
            for short, shape in spec.statistics.items()
        }

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the output, and what backward needs of this pass (None unless training)."""
        raise NotImplementedError

    def error(self, grad_output: Array, saved: Saved, context: StepContext) -> Array:
        """Return the gradient before the fused activation; `grad_output` itself where there is none."""
        return grad_output

    def backward_weight(self, error: Array, saved: Saved, context: StepContext) -> None:
        """Overwrite the gradients of `parameters` with the sum over the samples of this block."""

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return one gradient per input."""
        raise NotImplementedError

    def save(self, x: Array, y: Array) -> Saved:
        """Return what `forward` saves of an input and its output; only layers that run in pieces have this."""
        raise NotImplementedError

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return what `forward` would have saved of a smaller box of the output."""
        raise NotImplementedError

    def value(self, short: str) -> Array | None:
        """Return the value of a parameter by its short name, None where the layer has none such."""
        return self.parameters[short].value if short in self.parameters else None

    def grad(self, short: str) -> Array | None:
        """Return the gradient buffer of a parameter by its short name, None where the layer has none such."""
        return self.parameters[short].grad if short in self.parameters else None
