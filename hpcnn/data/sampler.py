"""The order of the images: a function of seed and epoch, the same on any number of ranks.

Blocks of consecutive rows are shuffled, so that a disk reads stretches; then samples within windows of many blocks.
The draws are counters sorted (see `hpcnn.rng`), so the order outlives any change to NumPy's own shuffle.
"""

from __future__ import annotations

import numpy as np

from hpcnn import rng
from hpcnn.errors import DataError

WINDOW_BLOCKS = 64
"""Blocks whose samples are mixed with each other."""


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Return the number of whole batches in an epoch; what is left over is dropped, other samples in each epoch.

    Raises
    ------
    DataError
        If there is not a single whole batch.
    """
    if global_batch > num_samples:
        raise DataError(
            f"data: train.global_batch (={global_batch}) is larger than the training set (={num_samples} images); an"
            " epoch needs one whole batch. Use a smaller batch or more images."
        )
    return num_samples // global_batch


def epoch_order(num_samples: int, seed: int, epoch: int, block: int) -> np.ndarray:
    """Return the permutation of range(num_samples) in which an epoch takes the samples, int64.

    Parameters
    ----------
    epoch : int
        From 0.
    block : int
        Consecutive rows that stay together on disk; a window has WINDOW_BLOCKS of them, and a set that is no larger
        than one window gets a plain shuffle.
    """
    block = min(block, max(1, num_samples))
    num_blocks = -(-num_samples // block)
    drawn = np.argsort(rng.bits(rng.key(seed, "order of blocks", epoch), np.arange(num_blocks)), kind="stable")
    rows = (drawn[:, None] * block + np.arange(block)).reshape(-1)
    rows = rows[rows < num_samples]
    keys = rng.bits(rng.key(seed, "order of samples", epoch), rows)
    order = np.empty(num_samples, np.int64)
    window = WINDOW_BLOCKS * block
    for start in range(0, num_samples, window):
        part = slice(start, start + window)
        order[part] = rows[part][np.argsort(keys[part], kind="stable")]
    return order
