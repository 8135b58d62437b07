"""Weighted averaging: once in a round all replicas become their average, in which better ones may count for more.

After Ramroach and Joshi, "Weighted averaging reparameterisation" (Parallel Processing Letters, 2021), of which the idea
is published where this project could read it, and not the formula: rules and formulas here are reconstructions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hpcnn.comm.collectives import allgather
from hpcnn.errors import NumericsError
from hpcnn.train.evaluate import evaluate
from hpcnn.train.rules.replicas import Replicas
from hpcnn.train.rules.rule import Record, Rule
from hpcnn.train.rules.weights import Scores, shares, smoothed, weights
from hpcnn.train.setup import Parts


class Weighted(Rule):
    """The rules that average all replicas once in a round, and at the end of the run.

    Parameters
    ----------
    parts : Parts
        The run.
    replicas : Replicas
        Of it.
    """

    def __init__(self, parts: Parts, replicas: Replicas) -> None:
        self._parts, self._replicas = parts, replicas
        self._config = parts.config.average
        self._round = self._config.every_steps or self._config.every_epochs * parts.steps_per_epoch
        self._shares: np.ndarray | None = None  # smoothed, of the last round
        self._equal = True

    def settles(self, step: int) -> bool:
        """See `Rule.settles`."""
        return step % self._round == 0 or step == self._parts.total_steps

    def after_step(self, step: int) -> Record | None:
        """See `Rule.after_step`."""
        self._equal = self.settles(step)
        if not self._equal:
            return None
        scores, record = self._scores(step)
        self._shares = smoothed(shares(self._config, scores), self._shares, self._config.smoothing)
        chosen = weights(self._shares, self._config.floor)
        return {"weights": chosen, "consensus": self._replicas.average(chosen), "lasting": True, **record}

    @contextmanager
    def averaged(self) -> Iterator[Record | None]:
        """See `Rule.averaged`; within a round the weights are those of the last one."""
        if self._equal:
            yield None
            return
        count = self._replicas.count
        known = np.full(count, 1.0 / count) if self._shares is None else self._shares
        chosen, put_back = weights(known, self._config.floor), self._replicas.keep()
        yield {"weights": chosen, "consensus": self._replicas.average(chosen, lasting=False), "lasting": False}
        put_back()

    def _scores(self, step: int) -> tuple[Scores, Record]:
        """Return what all replicas score, and what of it is to be recorded (collective)."""
        parts, record = self._parts, {}
        loss, accuracy = 0.0, 0.0
        if parts.validation_data is not None:
            self._parts.program.average_statistics()
            with parts.world.agreeing():
                score = evaluate(parts.program, parts.validation_data, parts.recipe.global_batch)
                loss, accuracy = score.loss, score.accuracy
        mine = np.array([[loss, accuracy, parts.draw.num_samples]])
        table = allgather(self._replicas.across.comm, mine, counts=[1] * self._replicas.count)
        if not np.isfinite(table).all():
            bad = int(np.flatnonzero(~np.isfinite(table).all(axis=1))[0])
            raise NumericsError(
                f"train: after step {step} the network of group {bad} has a loss of {table[bad, 0]} on the held-out"
                " images; it must be a finite number. Lower train.lr or average more often; checkpoints written so far"
                " are intact."
            )
        if parts.validation_data is not None:
            record = {"validation_loss": table[:, 0].tolist(), "validation_accuracy": table[:, 1].tolist()}
        return Scores(*np.ascontiguousarray(table.T)), record

    @property
    def state(self) -> str:
        """The shares of the last round, by which the next one's are smoothed; see `Rule.state`."""
        return "" if self._shares is None else json.dumps(self._shares.tolist())

    def restore(self, state: str) -> None:
        """See `Rule.restore`; shares of another number of groups are forgotten."""
        found = np.array(json.loads(state)) if state else None
        self._shares = found if found is not None and len(found) == self._replicas.count else None
        self._equal = True
