"""Fully connected layer."""

from __future__ import annotations

from hpcnn import ops
from hpcnn.arrays import Array
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer, Narrow, Saved
from hpcnn.spec import LinearSpec


class Linear(Layer[LinearSpec]):
    """Fully connected layer y = x W^T + b with optional bias and fused activation."""

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the features, shape (N, out); saved: the input, and the output if an activation is fused."""
        (x,) = inputs
        activation = self.spec.activation
        y = ops.linear_forward(x, self.value("weight"), self.value("bias"), activation=activation)
        return y, (self.save(x, y) if context.training else None)

    def save(self, x: Array, y: Array) -> Saved:
        """Return the input, and the output if an activation is fused."""
        return x, y if self.spec.activation else None

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return both, cut."""
        x, y = saved
        return to.inputs[0](x), None if y is None else to.output(y)

    def error(self, grad_output: Array, saved: Saved, context: StepContext) -> Array:
        """Return the gradient before the fused activation, shape (N, out)."""
        _, y = saved
        return ops.activation_backward(grad_output, y, self.spec.activation) if self.spec.activation else grad_output

    def backward_weight(self, error: Array, saved: Saved, context: StepContext) -> None:
        """Overwrite the gradients of weight and bias."""
        x, _ = saved
        ops.linear_backward_weight(x, error, bias=self.spec.bias, out=(self.grad("weight"), self.grad("bias")))

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient, shape (N, in)."""
        return (ops.linear_backward_input(error, self.value("weight")),)
