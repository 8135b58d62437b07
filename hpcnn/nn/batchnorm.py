"""Batch normalisation, over the samples of this process or over the whole global batch."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from hpcnn import arrays, ops
from hpcnn.arrays import Array
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer, Narrow, Saved
from hpcnn.nn.parameter import ParameterSet
from hpcnn.spec import BatchNormSpec


class BatchNorm(Layer[BatchNormSpec]):
    """Batch normalisation with optional fused activation.

    While training the statistics are those of the batch: of the global one when `context.reduce_sum` is given (ranks
    may hold different numbers of samples), else of the samples of this process. The running statistics move towards
    them by `momentum`, the variance as the unbiased estimate. With global statistics they are equal on all ranks;
    with local ones each rank has its own, and whoever saves them averages them over the ranks or saves rank 0's.
    Evaluation uses the running statistics.

    The gradients of gamma and beta come out of the sums that the input gradient needs, and the mask of the fused
    activation is applied there as well: `error` is the identity and `backward_weight` does nothing.
    """

    joint_backward = True

    def __init__(self, spec: BatchNormSpec, parameters: ParameterSet) -> None:
        super().__init__(spec, parameters)
        self.statistics["running_var"].fill(1)

    def forward(self, inputs: tuple[Array, ...], context: StepContext) -> tuple[Array, Saved]:
        """Return the normalised input, shape (N, ..., C); saved: the input, the statistics, the mask, the count."""
        (x,) = inputs
        if not context.training:
            running = (self.statistics["running_mean"], self.statistics["running_var"])
            return self._normalise(x, running)[0], None
        count = prod(x.shape[:-1])
        if count == 0:
            if context.reduce_sum is not None:
                nothing = np.zeros(self.spec.input_shape[-1])
                self._track(*_combine(nothing, nothing, 0, context.reduce_sum, like=x))
            return x, None
        statistics = None
        if context.reduce_sum is not None:
            mean, var, count = _combine(*ops.batchnorm_statistics(x), count, context.reduce_sum, like=x)
            statistics = (mean, var)
        y, mean, var, mask = self._normalise(x, statistics)
        if context.tracks:
            self._track(mean, var, count)
        return y, (x, mean, var, mask, count)

    def narrow(self, saved: Saved, to: Narrow) -> Saved:
        """Return the same with the input as it is kept; of the output, all is."""
        return None if saved is None else (to.inputs[0](saved[0]), *saved[1:])

    def backward_input(self, error: Array, saved: Saved, context: StepContext) -> tuple[Array, ...]:
        """Return the gradient of the input; overwrite the gradients of gamma and beta (this block's own sums)."""
        if saved is None:  # no positions here
            for parameter in self.parameters.values():
                parameter.grad[...] = 0
            if context.reduce_sum is not None:
                context.reduce_sum(np.zeros((2, self.spec.input_shape[-1])))
            return (error,)
        x, mean, var, mask, count = saved
        grad_input, _, _ = ops.batchnorm_backward(
            error,
            x,
            self.value("gamma"),
            mean,
            var,
            mask,
            epsilon=self.spec.epsilon,
            activation=self.spec.activation,
            count=count,
            reduce_sum=context.reduce_sum,
            out=(self.parameters["gamma"].grad, self.parameters["beta"].grad),
        )
        return (grad_input,)

    def _normalise(self, x: Array, statistics: tuple[Array, Array] | None) -> tuple[Array, Array, Array, Array]:
        spec = self.spec
        gamma, beta = self.value("gamma"), self.value("beta")
        return ops.batchnorm_forward(
            x, gamma, beta, epsilon=spec.epsilon, activation=spec.activation, statistics=statistics
        )

    def _track(self, mean: Array, var: Array, count: int) -> None:
        """Move the running statistics towards those of a batch of `count` positions."""
        running = self.statistics["running_mean"], self.statistics["running_var"]
        ops.batchnorm_track(mean, var, *running, momentum=self.spec.momentum, count=count)


def _combine(
    mean: Array, var: Array, count: int, reduce_sum: Callable[[np.ndarray], None], *, like: Array
) -> tuple[Array, Array, int]:
    """Return the mean, biased variance and count over everyone from each one's own (collective).

    One sum of float64 numbers: counts, sums, and sums of squares as count * (var + mean^2). They meet on the host,
    where the ranks exchange them; the results live where `like` does.
    """
    mean, var = (arrays.to_host(one).astype(np.float64) for one in (mean, var))
    packed = np.concatenate([np.full(1, count, np.float64), count * mean, count * (var + mean * mean)])
    reduce_sum(packed)
    total = packed[0]
    mean, square = np.split(packed[1:] / total, 2)
    var = np.maximum(square - mean * mean, 0.0)
    return arrays.to_device(mean, like), arrays.to_device(var, like), round(float(total))
