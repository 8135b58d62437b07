"""Butterfly mixing: after every step each replica is averaged with one other, with whom changes from step to step.

Zhao, Canny, "Butterfly mixing: accelerating incremental-update algorithms on clusters" (SDM 2013). A step sends one
message of all parameters, where a butterfly all-reduce of gradients sends lg P of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hpcnn.plan.schedules import mixing, num_stages
from hpcnn.train.rules.replicas import Replicas
from hpcnn.train.rules.rule import Record, Rule
from hpcnn.train.rules.weights import weights
from hpcnn.train.setup import Parts


class Mixing(Rule):
    """Averages of pairs, in the turns of `plan.schedules.mixing`; of all replicas after the last step.

    Momentum and running statistics stay with their replica, but for averages of all.

    Parameters
    ----------
    parts : Parts
        The run.
    replicas : Replicas
        Of it.
    """

    def __init__(self, parts: Parts, replicas: Replicas) -> None:
        self._replicas = replicas
        self._total_steps = parts.total_steps
        values, engine, count = replicas.parameters.values, replicas.across.engine, replicas.count
        self._stages = [
            engine.prepare(mixing(replicas.index, count, values.size, stage), values, label=f"mixing, stage {stage}")
            for stage in range(num_stages(count))
        ]
        self._weights = weights(np.full(count, 1.0 / count))
        self._equal = True

    def settles(self, step: int) -> bool:
        """See `Rule.settles`."""
        return True

    def after_step(self, step: int) -> Record | None:
        """See `Rule.after_step`."""
        stage = self._stages[(step - 1) % len(self._stages)]
        stage.start()
        stage.wait()
        values = self._replicas.parameters.values
        values *= values.dtype.type(0.5)
        self._equal = step == self._total_steps
        return self._average(lasting=True) if self._equal else None

    @contextmanager
    def averaged(self) -> Iterator[Record | None]:
        """See `Rule.averaged`."""
        if self._equal:
            yield None
            return
        put_back = self._replicas.keep()
        yield self._average(lasting=False)
        put_back()

    def restore(self, state: str) -> None:
        """See `Rule.restore`."""
        self._equal = True

    def _average(self, *, lasting: bool) -> Record:
        consensus = self._replicas.average(self._weights, lasting=lasting)
        return {"weights": self._weights, "consensus": consensus, "lasting": lasting}
