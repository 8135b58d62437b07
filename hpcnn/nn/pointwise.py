"""Layers without weights that look at one position at a time: activation, sum, dropout, flatten, shortcut."""

from __future__ import annotations

from math import prod

from hpcnn import arrays, ops, rng
from hpcnn.arrays import Array
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer, Narrow, Saved
from hpcnn.spec import ActivationSpec, AddSpec, DropoutSpec, FlattenSpec, ShortcutSpec


class Activation(Layer[ActivationSpec]):
    """ReLU or leaky ReLU on its own; mostly it is fused into the layer before."""

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the activations; saved: the same."""
        (x,) = inputs
        y = ops.activation_forward(x, self.spec.kind)
        return y, (y if context.training else None)

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return fewer activations."""
        return to.output(saved)

    def error(self, grad_output: Array, saved: Saved, context: StepContext) -> Array:
        """Return the gradient before the activation."""
        return ops.activation_backward(grad_output, saved, self.spec.kind)

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return `error`, which is the gradient already."""
        return (error,)


class Add(Layer[AddSpec]):
    """Sum of two inputs, with an optional fused activation."""

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the sum; saved: the same if an activation is fused."""
        a, b = inputs
        y = ops.add_forward(a, b, self.spec.activation)
        return y, (y if context.training and self.spec.activation else None)

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return less of the sum."""
        return None if saved is None else to.output(saved)

    def error(self, grad_output: Array, saved: Saved, context: StepContext) -> Array:
        """Return the gradient before the fused activation."""
        activation = self.spec.activation
        return ops.activation_backward(grad_output, saved, activation) if activation else grad_output

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return `error` twice, the same array."""
        return error, error


class Dropout(Layer[DropoutSpec]):
    """Zeros each number with probability `rate` while training; the identity in evaluation.

    The draw of an element depends on the seed, the layer's name, the step, the global sample and the element's place.
    """

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the surviving numbers, scaled by 1 / (1 - rate); saved: the mask."""
        (x,) = inputs
        if not context.training or self.spec.rate == 0.0:
            return x, None
        stream = rng.key(context.seed, f"dropout:{self.spec.name}", context.step)
        elements = None if self.box is None else rng.element_numbers(self.spec.output_shape, self.box)
        return ops.dropout_forward(x, self.spec.rate, stream, context.samples, elements)

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return less of the mask."""
        return None if saved is None else to.own(saved)

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient of the surviving numbers, zero elsewhere."""
        return (error if saved is None else ops.dropout_backward(error, saved, self.spec.rate),)


class Flatten(Layer[FlattenSpec]):
    """(N, H, W, C) -> (N, H * W * C), in that order: a view."""

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the input as rows; saved: its shape."""
        (x,) = inputs
        return x.reshape(x.shape[0], prod(x.shape[1:])), x.shape

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return the smaller input's shape."""
        return to.input_shape

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient in the shape of the input."""
        return (error.reshape(saved),)


class Shortcut(Layer[ShortcutSpec]):
    """Every so many rows and columns of the input, with zeros in the channels that it lacks."""

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the subsampled input, shape (N, P, Q, K); saved: the input's shape."""
        (x,) = inputs
        step_h, step_w = self.spec.stride
        kept = x[:, ::step_h, ::step_w]
        y = arrays.empty((*kept.shape[:3], self.spec.out_channels), x.dtype, like=x)
        y[..., : x.shape[3]] = kept
        y[..., x.shape[3] :] = 0
        return y, x.shape

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return the smaller input's shape."""
        return to.input_shape

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient, shape (N, H, W, C): zero at the rows and columns that were left out."""
        step_h, step_w = self.spec.stride
        grad_input = arrays.zeros(saved, error.dtype, like=error)
        grad_input[:, ::step_h, ::step_w] = error[..., : saved[3]]
        return (grad_input,)
