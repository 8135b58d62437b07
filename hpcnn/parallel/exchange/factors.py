"""Factors: a fully connected layer's global gradient from its factors, the inputs and errors of the whole batch.

The gradient of a weight (out, in) is E^T X with the errors E (N, out) and inputs X (N, in) of all N samples. Rank r
owns the weights of a slice of the input features. An all-to-all of inputs, which travels behind the layer's forward,
gives it its columns of X; an all-gather of errors, behind backward, all of E. One product then makes its slice of the
*global* gradient: no gradient is reduced, and a rank computes as much as it would have for its own samples. The bias
gradient is a sum of E that every rank computes for itself. Updated weights are gathered behind the next forward.

A rank with n of the N samples sends n in (P-1)/P + n out (P-1) elements before the update, instead of the
in out (P-1)/P of a reduce-scatter.

References
----------
Lee, Agrawal, Balaprakash, Choudhary, Liao, "Communication-efficient parallelization strategy for deep convolutional
neural network training", MLHPC 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpcnn import arrays, geometry, ops
from hpcnn.arrays import Array
from hpcnn.comm.collective import Collective
from hpcnn.comm.engine import Engine
from hpcnn.comm.persistent import prepare_allgather, prepare_alltoall
from hpcnn.config import ExchangeConfig
from hpcnn.geometry import Block
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.plan import schedules
from hpcnn.plan.buckets import Bucket
from hpcnn.spec import LinearSpec

URGENT = -1
"""Inputs and errors are small, and everything else of the layer waits for them."""


class FactorsCarrier(Carrier):
    """Carries one fully connected layer. `samples` are the blocks of the batch, one a rank."""

    replaces_gradient = True
    owns_whole_tensors = False

    def __init__(
        self,
        bucket: Bucket,
        spec: LinearSpec,
        samples: Sequence[Block],
        engine: Engine,
        parameters: ParameterSet,
        config: ExchangeConfig,
        priority: int,
    ) -> None:
        super().__init__(bucket)
        self._engine = engine
        rank, size = engine.rank, engine.size
        weight, self._bias = parameters[f"{spec.name}/weight"], None
        start, stop = parameters.offsets[weight.name]
        num_out, num_in = weight.value.shape
        self._features = geometry.blocks(num_in, size)
        mine, here = self._features[rank], samples[rank]
        # The weights of an input feature lie together, so those of a slice of features do.
        self._weight = Block(start, stop)
        self._bounds = [block.start * num_out for block in self._features] + [stop - start]
        owned = Block(start + mine.start * num_out, start + mine.stop * num_out)
        self.owned = self.counted = (owned,)
        if spec.bias:
            self._bias = parameters[f"{spec.name}/bias"].grad
            bias = Block(*parameters.offsets[f"{spec.name}/bias"])
            self.owned = (owned, bias)
            self.counted = self.owned if rank == 0 else (owned,)
        self._grad = parameters.grads[owned.start : owned.stop].reshape(mine.size, num_out).T

        dtype, batch = parameters.values.dtype, samples[-1].stop
        counts = [[block.size * features.size for features in self._features] for block in samples]
        self._places, arrivals = schedules.alltoall_places(rank, counts)
        self._work = arrays.empty(arrivals[-1], dtype, like=parameters.values)
        self._own_place = slice(arrivals[rank], arrivals[rank + 1])
        self._columns = self._work[arrivals[0] : arrivals[-1]].reshape(batch, mine.size)
        self._errors = arrays.empty((batch, num_out), dtype, like=parameters.values)
        self._own_rows = slice(here.start, here.stop)
        rows = [block.start * num_out for block in samples] + [batch * num_out]
        self._inputs_travel = prepare_alltoall(
            engine, self._work, counts, label=f"inputs of {self.label}", priority=URGENT, wire=config.wire
        )
        self._errors_travel = prepare_allgather(
            engine,
            self._errors.reshape(-1),
            rows,
            config.algorithm,
            label=f"errors of {self.label}",
            priority=URGENT,
            wire=config.wire,
        )
        self._gather = prepare_allgather(
            engine,
            parameters.values[start:stop],
            self._bounds,
            config.algorithm,
            label=f"parameters of {self.label}",
            priority=priority,
        )

    @property
    def reducing(self) -> tuple[Collective, ...]:
        """The exchanges of inputs and errors."""
        return (self._inputs_travel, self._errors_travel)

    @property
    def publishing(self) -> tuple[Collective, ...]:
        """The all-gather of weights."""
        return (self._gather,)

    def input_ready(self, layer: str, x: Array) -> None:
        """Send every rank its features of this rank's samples, if it has any."""
        if x.size:
            for place, features in zip(self._places, self._features, strict=False):
                block = x[:, features.start : features.stop]
                self._work[place : place + block.size].reshape(block.shape)[...] = block
            mine = self._features[self._engine.rank]
            self._work[self._own_place].reshape(-1, mine.size)[...] = x[:, mine.start : mine.stop]
        self._inputs_travel.start()

    def error_ready(self, layer: str, error: Array) -> None:
        """Send all ranks the errors of this rank's samples, if it has any."""
        if error.size:
            self._errors[self._own_rows] = error
        self._errors_travel.start()

    def take(self) -> None:
        """Compute this rank's slice of the global gradient, and all of the bias gradient."""
        super().take()
        if self._grad.size:
            ops.linear_backward_weight(
                self._columns, self._errors, bias=self._bias is not None, out=(self._grad, self._bias)
            )
        elif self._bias is not None:
            self._errors.sum(axis=0, out=self._bias)

    def publish(self) -> None:
        """Start the all-gather of the updated weights; every rank has updated the bias."""
        self._gather.start()

    def collect(self, flat: Array) -> None:
        """Send the slices to rank 0, which has the bias."""
        engine = self._engine
        schedule = schedules.gather(engine.rank, engine.size, 0, self._bounds)
        engine.run(schedule, flat[self._weight.start : self._weight.stop], f"state of {self.label}")
