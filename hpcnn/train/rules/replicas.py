"""One replica of a network in each group of ranks, and their weighted average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm.collectives import allreduce
from hpcnn.comm.persistent import prepare_allreduce
from hpcnn.errors import PlanError
from hpcnn.ops import squared_norm
from hpcnn.train.optimizers import Optimizer
from hpcnn.train.rules import directions
from hpcnn.train.setup import Parts


class Replicas:
    """The network, its statistics and its optimizer's state as every group has them.

    Parameters
    ----------
    parts : Parts
        The run, in more than one group.
    optimizer : Optimizer
        Whose state belongs to a replica.

    Raises
    ------
    PlanError
        If the plan cuts weights that are to be averaged by direction and length.
    """

    def __init__(self, parts: Parts, optimizer: Optimizer) -> None:
        config, across = parts.config, parts.groups.across
        assert across is not None, "one group has nothing to average"
        self.across = across
        self.count, self.index = parts.groups.count, parts.groups.index
        self.parameters = parts.model.parameters
        self.settle = parts.program.exchange.settle
        self._world = parts.world
        self._average_in_group = parts.program.average_statistics
        self._statistics = parts.model.statistics
        self._state = optimizer.state
        self._resets = config.average.momentum == "reset"
        self._reparameterised = config.average.reparameterised
        if self._reparameterised and any(cut > 1 for cut in parts.program.plan.cut.values()):
            raise PlanError(
                "plan: 'average.reparameterised' needs whole filters, and the plan cuts the weights of some layers."
                ' Set plan.preset = "data" or "spatial", or average.reparameterised = false.'
            )
        chosen = config.exchange.algorithm
        algorithm = "auto" if chosen in ("nccl", "pairwise") else chosen
        self._sums = {
            label: prepare_allreduce(across.engine, flat, algorithm, label=f"{label} of all groups")
            for label, flat in {"parameters": self.parameters.values, **self._state}.items()
        }

    def average(self, weights: Sequence[float], *, lasting: bool = True) -> float:
        """Replace every replica by the weighted average, equal bits; return how far they were from it (collective).

        Parameters
        ----------
        weights : sequence of float
            Of the groups, in order; they add up to 1.
        lasting : bool
            Whether training goes on from it: only then may momentum be reset.

        Returns
        -------
        float
            The root mean square, over the groups, of a replica's distance from the average, relative to its length.
        """
        mine, values = weights[self.index], self.parameters.values
        own = values.copy()
        if self._reparameterised:
            lengths = directions.part(self.parameters, mine)
            self._sum("parameters")
            allreduce(self.across.comm, lengths, "butterfly", label="lengths of all groups")
            directions.join(self.parameters, lengths)
        else:
            self._weigh(values, mine, "parameters")
        for slot, flat in self._state.items():
            if lasting and self._resets:
                flat.fill(0)
            else:
                self._weigh(flat, mine, slot)
        self._average_statistics(mine)
        own -= values
        squares = np.array([squared_norm(own), squared_norm(values)])
        allreduce(self._world.comm, squares, "butterfly", label="distance of replicas")
        return math.sqrt(squares[0] / squares[1]) if squares[1] > 0 else 0.0

    def keep(self) -> Callable[[], None]:
        """Return a function that puts everything back to what it is now."""
        kept = [(array, array.copy()) for array in self._arrays()]

        def put_back() -> None:
            for array, copy in kept:
                array[...] = copy

        return put_back

    def _arrays(self) -> list[Array]:
        return [self.parameters.values, *self._state.values(), *self._statistics.values()]

    def _weigh(self, flat: Array, weight: float, label: str) -> None:
        flat *= flat.dtype.type(weight)
        self._sum(label)

    def _sum(self, label: str) -> None:
        self._sums[label].start()
        self._sums[label].wait()

    def _average_statistics(self, weight: float) -> None:
        """Average running statistics of batch norm, which are few: in one message, in float64."""
        if not self._statistics:
            return
        self._average_in_group()
        packed = np.concatenate([arrays.to_host(one).ravel().astype(np.float64) for one in self._statistics.values()])
        packed *= weight
        allreduce(self.across.comm, packed, "butterfly", label="statistics of all groups")
        start = 0
        for one in self._statistics.values():
            found = packed[start : start + one.size].reshape(one.shape)
            arrays.overwrite(one, found.astype(one.dtype))
            start += one.size
