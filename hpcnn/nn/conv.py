"""Convolution layer."""

from __future__ import annotations

from typing import Any

from hpcnn import ops
from hpcnn.arrays import Array
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer, Narrow, Saved
from hpcnn.nn.parameter import ParameterSet
from hpcnn.spec import ConvSpec


class Conv(Layer[ConvSpec]):
    """2-D convolution with optional bias and fused activation."""

    def __init__(self, spec: ConvSpec, parameters: ParameterSet) -> None:
        super().__init__(spec, parameters)
        self._geometry: dict[str, Any] = {
            "stride": spec.stride,
            "padding": spec.padding,
            "dilation": spec.dilation,
            "groups": spec.groups,
        }

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the feature maps, shape (N, P, Q, K); saved: the input, and the output if an activation is fused."""
        (x,) = inputs
        activation = self.spec.activation
        y = ops.conv2d_forward(x, self.value("weight"), self.value("bias"), activation=activation, **self._geometry)
        return y, (self.save(x, y) if context.training else None)

    def save(self, x: Array, y: Array) -> Saved:
        """Return the input, and the output if an activation is fused."""
        return x, y if self.spec.activation else None

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return both, cut."""
        x, y = saved
        return to.inputs[0](x), None if y is None else to.output(y)

    def error(self, grad_output: Array, saved: Saved, context: StepContext) -> Array:
        """Return the gradient before the fused activation, shape (N, P, Q, K)."""
        _, y = saved
        return ops.activation_backward(grad_output, y, self.spec.activation) if self.spec.activation else grad_output

    def backward_weight(self, error: Array, saved: Saved, context: StepContext) -> None:
        """Overwrite the gradients of weight and bias."""
        x, _ = saved
        spec = self.spec
        out = (self.grad("weight"), self.grad("bias"))
        ops.conv2d_backward_weight(x, error, spec.kernel_size, bias=spec.bias, out=out, **self._geometry)

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient, shape (N, H, W, C)."""
        x, _ = saved
        return (ops.conv2d_backward_input(error, self.value("weight"), x.shape[1:3], **self._geometry),)
