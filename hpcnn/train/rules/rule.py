"""What the training loop asks of a rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]
"""Of an average, for the metrics: `weights`, the groups' in order; `consensus`, see `Replicas.average`; `lasting`,
whether training goes on from it; and `validation_loss` and `validation_accuracy` of the replicas, if they were scored.
"""


class Rule:
    """No average: all ranks train one network. The base of the other rules."""

    @property
    def state(self) -> str:
        """What a checkpoint keeps of the rule beside the averaged network; "": nothing."""
        return ""

    def after_step(self, step: int) -> Record | None:
        """Let the replicas move, after `step` updates in all; return a record if all were averaged (collective).

        Parameters must be current: see `settles`.
        """
        return None

    def settles(self, step: int) -> bool:
        """Return whether `after_step` will move parameters, which must then be current."""
        return False

    @contextmanager
    def averaged(self) -> Iterator[Record | None]:
        """Have every rank hold the average inside a `with` block, and its replica again after it (collective).

        Yields a record of it, unless the replicas are equal anyway.
        """
        yield None

    def restore(self, state: str) -> None:
        """Go on from the `state` in a checkpoint; every replica begins with the average in it."""
