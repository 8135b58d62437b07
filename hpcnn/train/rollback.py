"""Whether a run whose numbers went wrong may go back to its newest checkpoint, and how often."""

from __future__ import annotations

from hpcnn.config import TrainConfig
from hpcnn.errors import DivergenceError, NumericsError


class Rollbacks:
    """Counts the rollbacks of a run; the same on all ranks.

    Parameters
    ----------
    settings : TrainConfig
        Which faults are rolled back, how often, and what happens to the learning rate.
    """

    def __init__(self, settings: TrainConfig) -> None:
        self.count = 0
        self._settings = settings

    def factor(self, error: NumericsError) -> float:
        """Count a rollback, and return what it multiplies the learning rate by.

        Ranks that have come apart are a fault of a machine, and the rate stays as it is.

        Raises
        ------
        NumericsError
            `error`, if such faults end the run; another one, if there have been too many.
        """
        settings, diverged = self._settings, isinstance(error, DivergenceError)
        if (settings.on_divergence if diverged else settings.on_nan) != "rollback":
            raise error
        if self.count == settings.max_rollbacks:
            raise type(error)(f"{error} There have been train.max_rollbacks (={self.count}) rollbacks already.")
        self.count += 1
        return 1.0 if diverged else settings.rollback_lr
