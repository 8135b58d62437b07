"""Lazy update: the gradients of the lowest layers are added up on each rank, and travel once in a round of steps.

The layers of a lazy carrier keep their parameters during a round, and are then updated by the sum of the round's
gradients. Their messages, which the next forward would have to wait for first, become rarer; all other layers are
updated in every step.

References
----------
Lee, Agrawal, Balaprakash, Choudhary, Liao, "Improving scalability of parallel CNN training by adaptively adjusting
parameter update frequency", JPDC 159, 2022.
"""

from __future__ import annotations

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm.collective import Collective
from hpcnn.comm.engine import URGENT, Engine
from hpcnn.comm.persistent import prepare_allreduce
from hpcnn.geometry import Block
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.exchange.carrier import Carrier


class Rounds:
    """How long the rounds of a model's lazy carriers are: all have the same.

    Parameters
    ----------
    steps : int
        Length of the first round.
    watched : Block
        Stretch of the flat vector whose gradients tell whether rounds may be longer: the topmost lazy layer's. Empty:
        all rounds have the same length.
    parameters : ParameterSet
        Whose gradients.
    engine : Engine, optional
        Sums over ranks; None on one rank.
    """

    def __init__(self, steps: int, watched: Block, parameters: ParameterSet, engine: Engine | None) -> None:
        self.steps = steps
        self.number = 0
        """Of the step under way in its round, from 0."""
        self.last = steps == 1
        """Whether the step under way is the last of its round."""
        self._grads = parameters.grads[watched.start : watched.stop]
        self._both = np.zeros((2, watched.size), self._grads.dtype)  # the sum, and the last gradient
        self._sum = None
        if engine is not None and watched.size:
            self._sum = prepare_allreduce(
                engine, self._both.reshape(-1), "butterfly", label="gradients that lazy rounds go by", priority=URGENT
            )

    @property
    def adaptive(self) -> bool:
        """Whether rounds differ in length."""
        return self._both.size > 0

    def begin_step(self, *, last: bool) -> None:
        """Begin a step, the last of its round if it is its turn or asked for."""
        self.last = last or self.number + 1 >= self.steps

    def end_step(self) -> None:
        """Count the step; at the end of a whole round choose the length of the next (collective)."""
        self.number += 1
        if not self.last:
            return
        whole, self.number = self.number == self.steps, 0
        if whole and self.adaptive:
            self._adapt()
        self._both[:] = 0.0

    def restart(self) -> None:
        """Forget the steps of the round under way."""
        self.number = 0
        self._both[:] = 0.0

    def note(self) -> None:
        """Add up this step's gradients of the watched layer, before they are replaced by their sum."""
        if self.adaptive:
            self._both[1] = arrays.to_host(self._grads)
            self._both[0] += self._both[1]

    def _adapt(self) -> None:
        """One step more where the last gradient g of the round's sum s says little new, one less where it says much.

        Longer if |g - s|^2 + |g|^2 <= |s|^2 and k |g|^2 <= |s|^2, shorter if neither, of k steps.
        """
        if self._sum is not None:
            self._sum.start()
            self._sum.wait()
        total, last = self._both.astype(np.float64)
        squares = [float(vector @ vector) for vector in (last - total, last, total)]
        along = squares[0] + squares[1] <= squares[2]
        small = self.steps * squares[1] <= squares[2]
        if along and small:
            self.steps += 1
        elif not along and not small:
            self.steps = max(1, self.steps - 1)


class LazyCarrier(Carrier):
    """Adds gradients up during a round and has another carrier exchange the sum.

    Parameters
    ----------
    inner : Carrier
        How the sum travels; any but one that makes gradients itself.
    watched : str
        The layer by whose gradients rounds go, of this carrier or another.
    """

    def __init__(self, inner: Carrier, rounds: Rounds, parameters: ParameterSet, *, watched: str) -> None:
        super().__init__(inner.bucket)
        self.inner = inner
        self.owned, self.counted = inner.owned, inner.counted
        self.owns_whole_tensors = inner.owns_whole_tensors
        self._rounds, self._notes = rounds, watched in inner.layers
        self._grads = parameters.grads[inner.bucket.start : inner.bucket.stop]
        self._sum = arrays.zeros(self._grads.shape, like=self._grads)

    @property
    def moves(self) -> bool:  # type: ignore[override]
        """Whether this step ends a round."""
        return self._rounds.last

    @property
    def reducing(self) -> tuple[Collective, ...]:
        """Those of the sum."""
        return self.inner.reducing

    @property
    def publishing(self) -> tuple[Collective, ...]:
        """Those of the sum."""
        return self.inner.publishing

    def begin(self) -> None:
        """Add this step's gradients up; at the end of a round start their exchange."""
        if self._notes:
            self._rounds.note()
        self._sum += self._grads
        if self.moves:
            self._grads[:] = self._sum
            self._sum[:] = 0.0
            self.inner.begin()

    def take(self) -> None:
        """Return with the global sum of `owned` in the flat vector, at the end of a round."""
        if self.moves:
            self.inner.take()

    def publish(self) -> None:
        """Start telling the other ranks the parameters of `owned`, at the end of a round."""
        if self.moves:
            self.inner.publish()

    def forget(self) -> None:
        """Forget the gradients that have been added up."""
        self._sum[:] = 0.0

    def collect(self, flat: Array) -> None:
        """Complete the first replica's copy."""
        self.inner.collect(flat)
