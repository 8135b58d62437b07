"""A convolution or fully connected layer whose input channels are cut: sums that others complete."""

from __future__ import annotations

import numpy as np

from hpcnn import ops
from hpcnn.arrays import Array
from hpcnn.nn.context import StepContext
from hpcnn.nn.conv import Conv
from hpcnn.nn.layer import Layer, Narrow, Saved
from hpcnn.nn.linear import Linear
from hpcnn.nn.parameter import ParameterSet
from hpcnn.spec import ConvSpec, PartialSumSpec


class PartialSum(Layer[PartialSumSpec]):
    """The sums over some of the input channels, and bias and activation of the sums that are completed here.

    `forward` makes partial sums. The program adds up those of all input channels, each sum on one rank, and `complete`
    turns them into the output. On the way back `error` is that of the completed sums, and ends the bias's gradient;
    the program hands it to everyone who made a part of these sums, for `backward_weight` and `backward_input`.
    """

    def __init__(self, spec: PartialSumSpec, parameters: ParameterSet) -> None:
        super().__init__(spec, parameters)
        product = spec.product
        self._product: Conv | Linear = (
            Conv(product, parameters) if isinstance(product, ConvSpec) else Linear(product, parameters)
        )

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the partial sums, shape (N, ..., K); saved: what the product saves."""
        return self._product.forward(inputs, context)

    def complete(self, sums: Array, saved: Saved) -> tuple[Array, Saved]:
        """Return the output from complete sums, shape (N, ..., `num_completed`), which may be changed.

        Saved: what was, and the output if an activation is fused.
        """
        bias, activation = self.value("bias"), self.spec.activation
        if sums.size and bias is not None:
            sums += bias
        if sums.size and activation:
            sums = ops.activation_forward(sums, activation)
        return sums, (None if saved is None else (saved, sums if activation else None))

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return both, cut."""
        kept, y = saved
        return self._product.narrow(kept, to), None if y is None else to.output(y)

    def error(self, grad_output: Array, saved: Saved, context: StepContext) -> Array:
        """Return the gradient before the fused activation, of the completed sums; overwrite the bias's gradient."""
        activation, bias = self.spec.activation, self.grad("bias")
        error = grad_output
        if error.size and activation:
            error = ops.activation_backward(grad_output, saved[1], activation)
        if error.size and bias is not None:
            bias[...] = error.reshape(-1, self.spec.num_completed).sum(axis=0, dtype=np.float64)
        return error

    def backward_weight(self, error: Array, saved: Saved, context: StepContext) -> None:
        """Overwrite the weight's gradient, from the error of all sums of which parts were made here."""
        self._product.backward_weight(error, saved[0], context)

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient of the input channels that were summed over."""
        return self._product.backward_input(error, saved[0], context)
