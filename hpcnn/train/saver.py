"""Checkpoints written behind the training: rank 0 copies the tensors, a thread writes them.

At most one is under way: the next waits for it. What goes wrong is kept and told at the next step or checkpoint, when
all ranks can raise it together, or once as a warning (`checkpoint.on_error`). The last checkpoint of a run, finished or
asked to stop, is waited for, and its error is always raised: nobody shall take such a run for saved.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping

import numpy as np

from hpcnn.arrays import Array
from hpcnn.config import CheckpointConfig
from hpcnn.errors import CheckpointError, HpcnnError
from hpcnn.train.checkpoint import Checkpoint, Store

REMEDY = " Training goes on without it; checkpoint.on_error is 'continue'."


class Saver:
    """Writes the checkpoints of one run, on one rank, and decides what becomes of errors.

    Parameters
    ----------
    store : Store
        Where they go.
    settings : CheckpointConfig
        Whether to write in the background, and what to do about errors.
    warn : callable
        Tells people a line.

    Attributes
    ----------
    error : HpcnnError or None
        What has gone wrong and is to end the run, at a moment when all ranks can agree on it.
    """

    def __init__(self, store: Store, settings: CheckpointConfig, warn: Callable[[str], None]) -> None:
        self.error: HpcnnError | None = None
        self._store = store
        self._settings = settings
        self._warn = warn
        self._told: set[type] = set()
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None  # of the last checkpoint

    def save(self, checkpoint: Checkpoint, *, best: bool = False, final: bool = False, wait: bool = False) -> None:
        """Write a checkpoint, or begin to; its arrays may change once this returns.

        Parameters
        ----------
        checkpoint : Checkpoint
            What to write.
        best, final : bool
            As for `Store.save`.
        wait : bool
            Return only when it is on the disk; so does a final one.

        Raises
        ------
        CheckpointError
            If an earlier one could not be written and that ends the run; if this one could not, and it is waited for.
        """
        self.settle()
        if self.error is not None:
            raise self.error
        wait = wait or final
        if not self._settings.background or wait:
            self._write(checkpoint, best, final)
        else:
            frozen = _copied(checkpoint)
            # Not a daemon: a run that fails meanwhile still completes it.
            self._thread = threading.Thread(target=self._write, args=(frozen, best, final), name="checkpoint")
            self._thread.start()
        failure = self._failure if self._thread is None else None
        if failure is not None and (wait or self.error is not None):
            raise failure

    def settle(self) -> None:
        """Return once nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def note(self, error: HpcnnError) -> None:
        """Take notice of something that could not be written: keep it as `error`, or warn once of its kind."""
        if self._settings.on_error == "stop":
            self.error = self.error or error
        elif type(error) not in self._told:
            self._told.add(type(error))
            self._warn(f"hpcnn: warning: {error}{REMEDY}")

    def _write(self, checkpoint: Checkpoint, best: bool, final: bool) -> None:
        self._failure = None
        try:
            self._store.save(checkpoint, best=best, final=final)
        except CheckpointError as error:
            self._failure = error
            self.note(error)
        else:
            self._told.discard(CheckpointError)  # the next failure is news again


def _copied(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with arrays of its own, in the order in which they lie in memory: the fastest to copy."""

    def copies(arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: np.array(array, order="K") for name, array in arrays.items()}

    return dataclasses.replace(
        checkpoint,
        parameters=copies(checkpoint.parameters),
        statistics=copies(checkpoint.statistics),
        optimizer={slot: copies(tensors) for slot, tensors in checkpoint.optimizer.items()},
    )
