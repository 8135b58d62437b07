"""How one step moves parameters: the rule, its rate, and the limit on the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hpcnn.arrays import Array
from hpcnn.errors import NumericsError
from hpcnn.geometry import Block
from hpcnn.ops.update import squared_norm
from hpcnn.timeline import OFF, Timeline
from hpcnn.train.optimizers import Lars, Optimizer


class StepUpdate:
    """The update of one step; what an exchange calls when gradients are global.

    Parameters
    ----------
    optimizer : Optimizer
        The rule.
    lr : float
        Rate of this step.
    step : int
        Number of this update, from 0.
    clip_norm : float
        Largest norm of the whole gradient; 0: no limit.
    whole_tensors : bool
        Whether this rank has all of every gradient that it updates with, rather than slices.
    sum_over_ranks : callable
        Sums a float64 array over the ranks, in place.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr: float,
        step: int,
        *,
        clip_norm: float,
        whole_tensors: bool,
        sum_over_ranks: Callable[[Array], None],
        timeline: Timeline = OFF,
    ) -> None:
        self.lr = lr
        self._optimizer = optimizer
        self._step = step
        self._clip_norm = clip_norm
        self._sum_over_ranks = sum_over_ranks
        self._needs_norms = isinstance(optimizer, Lars) and not whole_tensors
        self._norms: Array | None = None
        self._scale = 1.0
        self._timeline = timeline

    @property
    def together(self) -> bool:
        """Whether the update of one parameter depends on the gradients of others."""
        return self._clip_norm > 0 or self._needs_norms

    def look(self, counted: Sequence[Block]) -> None:
        """Find out the norms of the whole gradient, of which every rank passes its share (collective).

        Raises
        ------
        NumericsError
            On every rank, if the norm is not a finite number.
        """
        if self._clip_norm:
            grads = self._optimizer.parameters.grads
            total = np.array([math.fsum(squared_norm(grads[start:stop]) for start, stop in counted)])
            self._sum_over_ranks(total)
            norm = math.sqrt(total[0]) if total[0] >= 0 else math.nan
            if not math.isfinite(norm):
                raise NumericsError(
                    f"clip: the norm of the gradient is {norm}; it must be finite. Lower train.lr or lengthen the"
                    " warm-up."
                )
            self._scale = self._clip_norm / norm if norm > self._clip_norm else 1.0
        if self._needs_norms:
            assert isinstance(self._optimizer, Lars)
            norms = sum(self._optimizer.squared_norms(start, stop) for start, stop in counted)
            self._norms = np.zeros((len(self._optimizer.parameters.parameters), 2)) + norms
            self._sum_over_ranks(self._norms)

    def move(self, block: Block) -> None:
        """Update the parameters of a stretch of the flat vector."""
        with self._timeline.span("update", "compute"):
            options = {} if self._norms is None else {"norms": self._norms}
            self._optimizer.update(self.lr, self._step, block.start, block.stop, scale=self._scale, **options)
