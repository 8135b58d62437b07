"""Several ranks of an import, as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcnn.errors import HpcnnError


class _Shared:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.slots: list[Any] = [None] * size


class ThreadTeam:
    """One rank of a team of threads; as `hpcnn.data.importers.Team`."""

    def __init__(self, shared: _Shared, rank: int, size: int) -> None:
        self.rank, self.size, self._shared = rank, size, shared

    def agree(self, error: HpcnnError | None) -> None:
        found = [one for one in self._exchange(error) if one is not None]
        if found:
            raise type(found[0])(str(found[0]))

    def sum(self, array: np.ndarray) -> None:
        array[...] = np.sum(self._exchange(array.copy()), axis=0)

    def _exchange(self, value: Any) -> list[Any]:
        self._shared.slots[self.rank] = value
        self._shared.barrier.wait()
        everyone = list(self._shared.slots)
        self._shared.barrier.wait()
        return everyone


def run_team(size: int, work: Callable[[ThreadTeam], Any]) -> list[Any]:
    """Return what `work` returns or raises on each of `size` ranks."""
    shared, results = _Shared(size), [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadTeam(shared, rank, size))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, HpcnnError):
                shared.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results
