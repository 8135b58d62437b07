"""Pooling layers. Sizes come from the arrays, so that a layer serves a tile of the image as well as all of it."""

from __future__ import annotations

from hpcnn import ops
from hpcnn.arrays import Array
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer, Narrow, Saved
from hpcnn.spec import GlobalAveragePoolSpec, PoolSpec


class MaxPool(Layer[PoolSpec]):
    """Largest value in each window; backward sends the gradient to the place where it was found first."""

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the maxima, shape (N, P, Q, C); saved: their places in the windows, and the input's (H, W)."""
        (x,) = inputs
        spec = self.spec
        y, argmax = ops.maxpool2d_forward(x, spec.window, stride=spec.stride, padding=spec.padding)
        return y, ((argmax, x.shape[1:3]) if context.training else None)

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return the places of fewer maxima."""
        return to.own(saved[0]), to.input_shape[1:3]

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient, shape (N, H, W, C)."""
        argmax, size = saved
        spec = self.spec
        return (ops.maxpool2d_backward(error, argmax, size, spec.window, stride=spec.stride, padding=spec.padding),)


class AveragePool(Layer[PoolSpec]):
    """Mean of each window, padding included."""

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the means, shape (N, P, Q, C); saved: the input's (H, W)."""
        (x,) = inputs
        spec = self.spec
        y = ops.avgpool2d_forward(x, spec.window, stride=spec.stride, padding=spec.padding)
        return y, (x.shape[1:3] if context.training else None)

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return the smaller input's (H, W)."""
        return to.input_shape[1:3]

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient, shape (N, H, W, C)."""
        spec = self.spec
        return (ops.avgpool2d_backward(error, saved, spec.window, stride=spec.stride, padding=spec.padding),)


class GlobalAveragePool(Layer[GlobalAveragePoolSpec]):
    """Mean over all rows and columns."""

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the means, shape (N, C); saved: the input's (H, W)."""
        (x,) = inputs
        return ops.global_avgpool_forward(x), (x.shape[1:3] if context.training else None)

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return the smaller input's (H, W)."""
        return to.input_shape[1:3]

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient, shape (N, H, W, C)."""
        return (ops.global_avgpool_backward(error, saved),)
