"""What may look at a network between the steps of its training, without a trace in it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Observer(Protocol):
    """Measures something of a network while it trains. All ranks call all methods alike."""

    def begin(self, folder: Path, step: int) -> None:
        """Get ready for a run in `folder` that goes on behind `step`; forget what was recorded later (collective)."""

    def due(self, step: int) -> bool:
        """Return whether to observe after `step`, the same on all ranks; 0 is before the first."""

    def observe(self, step: int) -> None:
        """Look at the network; its parameters are current (collective)."""

    def settle(self) -> None:
        """Write what was observed: a checkpoint, from which a run may go on, is about to follow (collective)."""
