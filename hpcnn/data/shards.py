"""Which training images groups of ranks train with, and which are held out to compare their replicas.

A shard is drawn, not cut out of the file, where neighbours may be of one class. Draws depend on the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcnn import rng
from hpcnn.errors import DataError


def held_out(num_samples: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train with and the `count` rows that are held out, both ascending, int64.

    Raises
    ------
    DataError
        If nothing would be left to train with.
    """
    if count >= num_samples:
        raise DataError(
            f"data: average.validation_samples (={count}) must be fewer than the training images (={num_samples})."
            " Hold out fewer."
        )
    drawn = _shuffled(np.arange(num_samples), seed, "held-out images")
    return np.sort(drawn[count:]), np.sort(drawn[:count])


def shards(rows: np.ndarray, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Return disjoint shards of `rows`, together all of them, each ascending, int64; fractions add up to 1."""
    drawn = _shuffled(rows, seed, "shards")
    ends = np.round(np.cumsum(fractions) * len(rows)).astype(np.int64)
    return [np.sort(part) for part in np.split(drawn, ends[:-1])]


def _shuffled(rows: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    order = np.argsort(rng.bits(rng.key(seed, purpose), rows), kind="stable")
    return np.asarray(rows, np.int64)[order]
