"""Update rules over a model's flat parameters: SGD, Adam, AdamW, LARS, and clipping by the global norm.

An optimizer updates any stretch [start, stop) of the flat buffers, so that it may follow an exchange bucket by bucket,
or own one shard. Weight decay applies where `Parameter.decay` says so, which is to weights only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.config import TrainConfig
from hpcnn.errors import NumericsError
from hpcnn.nn.parameter import Parameter, ParameterSet
from hpcnn.ops.update import adam_update, lars_rate, lars_update, sgd_update, squared_norm


class Segment(NamedTuple):
    """A stretch of the flat buffers with one setting of weight decay."""

    start: int
    stop: int
    decay: bool


class Optimizer(ABC):
    """Base of the update rules.

    Attributes
    ----------
    slots : tuple of str
        Names of the rule's state, as they stand in a checkpoint.
    state : dict of str to Array, shape (count,)
        One flat array a slot, laid out as the parameters; zero at the start.
    """

    slots: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig, parameters: ParameterSet) -> None:
        self.config = config
        self.parameters = parameters
        self.segments = segments(parameters)
        values = parameters.values
        spared = [(segment.start, segment.stop) for segment in self.segments if not segment.decay]
        self._spared: Array | None = None
        if spared and config.weight_decay:
            self._spared = arrays.to_device(np.array(spared, np.int64), like=values)
        self.state: dict[str, Array] = {
            slot: arrays.zeros(values.shape, values.dtype, like=values) for slot in self.slots
        }

    def update(
        self, lr: float, step: int, start: int | None = None, stop: int | None = None, *, scale: float = 1.0
    ) -> None:
        """Update the weights [start, stop) (left out: all of them) from their gradients, in place.

        Parameters
        ----------
        lr : float
            Learning rate of this step.
        step : int
            Number of this update, from 0.
        start, stop : int, optional
            Stretch of the flat buffers. Stretches that cover them all give the same bits as one call.
        scale : float
            Factor of the gradients, from `clip_scale`.
        """
        first, last = self._range(start, stop)
        if first < last:
            self._apply(slice(first, last), self.config.weight_decay, lr, step, scale)

    @abstractmethod
    def _apply(self, part: slice, weight_decay: float, lr: float, step: int, scale: float) -> None:
        """Update one stretch."""

    def _range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        return 0 if start is None else start, self.parameters.values.size if stop is None else stop


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum (see `hpcnn.ops.update.sgd_update`)."""

    slots = ("velocity",)

    def _apply(self, part: slice, weight_decay: float, lr: float, step: int, scale: float) -> None:
        sgd_update(
            self.parameters.values[part],
            self.parameters.grads[part],
            self.state["velocity"][part],
            lr=lr,
            momentum=self.config.momentum,
            weight_decay=weight_decay,
            nesterov=self.config.nesterov,
            scale=scale,
            spared=self._spared,
            first=part.start,
        )


class Adam(Optimizer):
    """Adam, and AdamW where the configuration says so (see `hpcnn.ops.update.adam_update`)."""

    slots = ("first_moment", "second_moment")

    def _apply(self, part: slice, weight_decay: float, lr: float, step: int, scale: float) -> None:
        adam_update(
            self.parameters.values[part],
            self.parameters.grads[part],
            self.state["first_moment"][part],
            self.state["second_moment"][part],
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            epsilon=self.config.epsilon,
            weight_decay=weight_decay,
            decoupled=self.config.optimizer == "adamw",
            step=step,
            scale=scale,
            spared=self._spared,
            first=part.start,
        )


class Lars(Optimizer):
    """Layer-wise adaptive rate scaling: each weight tensor has its own rate, trust * |w| / (|g| + wd * |w| + epsilon).

    Biases and norm parameters take the global rate as it is and no decay. Norms are of whole tensors even where only
    a stretch of one is updated, so all of its gradient must be there; a shard that holds a part of it sums
    `squared_norms` over the shards and passes the result.

    References
    ----------
    You, Gitman, Ginsburg, "Large batch training of convolutional networks", arXiv:1708.03888.
    """

    slots = ("velocity",)

    def squared_norms(self, start: int | None = None, stop: int | None = None) -> Array:
        """Return the squared norms (num_parameters, 2) of weights and gradients, of the part in [start, stop) only.

        float64. Rows of tensors without decay stay zero: they are not adapted.
        """
        norms = np.zeros((len(self.parameters.parameters), 2))
        for row, (parameter, part) in enumerate(self._parts(start, stop)):
            if parameter.decay and part.start < part.stop:
                norms[row] = squared_norm(self.parameters.values[part]), squared_norm(self.parameters.grads[part])
        return norms

    def update(
        self,
        lr: float,
        step: int,
        start: int | None = None,
        stop: int | None = None,
        *,
        scale: float = 1.0,
        norms: Array | None = None,
    ) -> None:
        """Update the weights [start, stop) as `Optimizer.update` does.

        `norms` are the squared norms (num_parameters, 2) of whole tensors; left out, they are taken from the buffers.
        """
        for row, (parameter, part) in enumerate(self._parts(start, stop)):
            if part.start >= part.stop:
                continue
            if not parameter.decay:
                self._apply(part, 0.0, lr, step, scale)
                continue
            squares = self._squares(parameter) if norms is None else norms[row]
            self._apply(part, self.config.weight_decay, lr * self._local_rate(squares, scale), step, scale)

    def _parts(self, start: int | None, stop: int | None) -> Iterator[tuple[Parameter, slice]]:
        """Yield each parameter with its part of [start, stop), which may be empty."""
        first, last = self._range(start, stop)
        for parameter in self.parameters.parameters:
            begin, end = self.parameters.offsets[parameter.name]
            yield parameter, slice(max(first, begin), min(last, end))

    def _squares(self, parameter: Parameter) -> tuple[float, float]:
        """Return the squared norms of a whole tensor and of its gradient."""
        whole = slice(*self.parameters.offsets[parameter.name])
        return squared_norm(self.parameters.values[whole]), squared_norm(self.parameters.grads[whole])

    def _local_rate(self, squares: Sequence[float], scale: float) -> float:
        return lars_rate(
            math.sqrt(squares[0]),
            scale * math.sqrt(squares[1]),
            trust_coefficient=self.config.trust_coefficient,
            weight_decay=self.config.weight_decay,
            epsilon=self.config.epsilon,
        )

    def _apply(self, part: slice, weight_decay: float, lr: float, step: int, scale: float) -> None:
        lars_update(
            self.parameters.values[part],
            self.parameters.grads[part],
            self.state["velocity"][part],
            rate=lr,
            momentum=self.config.momentum,
            weight_decay=weight_decay,
            scale=scale,
        )


def build(config: TrainConfig, parameters: ParameterSet) -> Optimizer:
    """Return the optimizer that `config.optimizer` names, with zero state."""
    match config.optimizer:
        case "sgd":
            return Sgd(config, parameters)
        case "adam" | "adamw":
            return Adam(config, parameters)
        case "lars":
            return Lars(config, parameters)


def segments(parameters: ParameterSet) -> list[Segment]:
    """Return the stretches of neighbouring parameters that share their setting of weight decay, in order."""
    found: list[Segment] = []
    for parameter in parameters.parameters:
        start, stop = parameters.offsets[parameter.name]
        if found and found[-1].stop == start and found[-1].decay == parameter.decay:
            found[-1] = Segment(found[-1].start, stop, parameter.decay)
        else:
            found.append(Segment(start, stop, parameter.decay))
    return found


def clip_scale(parameters: ParameterSet, max_norm: float) -> tuple[float, float]:
    """Return (scale, norm): the factor that shortens the gradient to `max_norm`, and its norm over all parameters.

    The gradients themselves are not changed: `Optimizer.update` takes the scale. `max_norm` 0 means no limit.

    Raises
    ------
    NumericsError
        If the norm is not a finite number.
    """
    norm = math.sqrt(squared_norm(parameters.grads))
    if not math.isfinite(norm):
        raise NumericsError(
            f"clip: the norm of the gradient is {norm}; it must be finite. Lower train.lr or lengthen the warm-up."
        )
    return (max_norm / norm if 0.0 < max_norm < norm else 1.0), norm
