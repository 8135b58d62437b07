"""A run's state: what a checkpoint holds, gathered from all ranks and put back into them."""

from __future__ import annotations

from typing import NamedTuple

from hpcnn import configuration
from hpcnn.parallel.whole import Whole
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train.checkpoint import Checkpoint
from hpcnn.train.optimizers import Optimizer
from hpcnn.train.setup import Parts


class Counters(NamedTuple):
    """What of a run's state is no array."""

    step: int = 0
    """Updates made so far."""
    best_accuracy: float = 0.0
    """Best test accuracy so far."""
    lr_scale: float = 1.0
    """What rollbacks have multiplied the learning rate by."""
    average: str = ""
    """State of the rule that averages replicas."""


class State:
    """The arrays that make up a run: parameters, statistics, and the optimizer's.

    Parameters
    ----------
    parts : Parts
        Data, model and program.
    optimizer : Optimizer
        Whose state it is.
    """

    def __init__(self, parts: Parts, optimizer: Optimizer) -> None:
        self._parts = parts
        self._optimizer = optimizer
        self._world = parts.world
        self._whole = Whole(parts.model, parts.program.plan, parts.program.world)

    def gather(self, counters: Counters) -> Checkpoint:
        """Return everything, on rank 0, perhaps as views of what training changes; other ranks get parts (collective).

        All parameters must be current.
        """
        parts, model, exchange = self._parts, self._parts.model, self._parts.program.exchange
        for slot in self._optimizer.state.values():
            exchange.collect(slot)
        return Checkpoint(
            model=model.spec.name,
            parameters=self._whole.tensors(model.parameters.values),
            optimizer={slot: self._whole.tensors(flat) for slot, flat in self._optimizer.state.items()},
            statistics=self._whole.statistics(),
            config=configuration.to_toml(parts.config) if self._world.rank == 0 else "",
            step=counters.step,
            epoch=counters.step // parts.steps_per_epoch,
            best_accuracy=counters.best_accuracy,
            lr_scale=counters.lr_scale,
            average=counters.average,
            arithmetic=parts.arithmetic,
            lazy_steps=exchange.round_steps,
            data_fingerprint=parts.train_data.fingerprint() if self._world.rank == 0 else "",
        )

    def restore(self, loaded: Checkpoint | None, *, parameters_only: bool = False) -> Counters | None:
        """Put a checkpoint that rank 0 has read into every rank, and return its counters (collective).

        Where rank 0 passes None, nothing happens and None is returned.

        Raises
        ------
        CheckpointError
            On every rank, if it does not fit the model or the optimizer; nothing is changed then.
        """
        model, optimizer = self._parts.model, self._optimizer
        room = self._whole.room({}, {}) if parameters_only else self._whole.room(optimizer.state, model.statistics)
        with self._world.agreeing():
            if loaded is not None:
                checkpoints.restore_into(
                    loaded,
                    model=model.spec.name,
                    parameters=room.parameters,
                    statistics=None if parameters_only else room.statistics,
                    optimizer=None if parameters_only else room.state,
                )
        mine = None
        if loaded is not None:
            mine = Counters(loaded.step, loaded.best_accuracy, loaded.lr_scale, loaded.average), loaded.lazy_steps
        found = self._world.broadcast_obj(mine)
        if found is None:
            return None
        arrays = [room.parameters.values]
        if not parameters_only:
            arrays += [*room.statistics.values(), *room.state.values()]
            self._parts.program.exchange.resume_rounds(found[1])
        for array in arrays:
            self._world.broadcast(array)
        self._whole.take(room, optimizer.state)
        return Counters(*found[0])
