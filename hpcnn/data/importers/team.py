"""The ranks of an import, as far as it needs them; `data` itself knows no MPI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from hpcnn.errors import DataError, HpcnnError


class Team(Protocol):
    """Several processes that import one data set together.

    Attributes
    ----------
    rank, size : int
        Which of them this is, and how many they are.
    """

    rank: int
    size: int

    def agree(self, error: HpcnnError | None) -> None:
        """Return once all have come here; raise on all what any brings along (collective)."""

    def sum(self, array: np.ndarray) -> None:
        """Replace the int64 array by its sum over all (collective)."""


class Alone:
    """A team of one."""

    rank = 0
    size = 1

    def agree(self, error: HpcnnError | None) -> None:
        """See `Team.agree`."""
        if error is not None:
            raise error

    def sum(self, array: np.ndarray) -> None:
        """See `Team.sum`."""


@contextmanager
def together(team: Team, doing: str) -> Iterator[None]:
    """Run a block that may fail on one rank only, then agree (collective); `doing` words a failure of the system."""
    error: HpcnnError | None = None
    try:
        yield
    except HpcnnError as caught:
        error = caught
    except OSError as caught:
        error = DataError(f"data: {doing} failed: {caught}. Check the path, its permissions and the free space.")
    team.agree(error)


def check_same(team: Team, value: int, what: str) -> None:
    """Raise DataError on all ranks unless all bring the same `value`, of at most 62 bits (collective)."""
    values = np.zeros(team.size, np.int64)
    values[team.rank] = value
    team.sum(values)
    if (values != values[0]).any():
        raise DataError(
            f"data: the ranks do not see the same {what}; all must read one copy. Use a file system that all nodes"
            " share, or import on one node."
        )
