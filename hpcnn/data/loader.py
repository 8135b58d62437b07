"""One rank's part of every batch, prepared ahead by a thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hpcnn.config import DataConfig
from hpcnn.data.augment import Augmentation, normalise
from hpcnn.data.dataset import DataSet
from hpcnn.data.prefetch import Prefetcher
from hpcnn.data.sampler import epoch_order, steps_per_epoch
from hpcnn.errors import DataError
from hpcnn.geometry import split


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    images: np.ndarray
    """float32 (n, H, W, C), normalised."""
    labels: np.ndarray
    """int64 (n,)."""
    samples: np.ndarray
    """int64 (n,): index of each image in its data set."""


class Loader:
    """Iterates once over this rank's batches of training, from one step on. A context manager.

    Step s takes positions [b B, (b + 1) B) of the order of epoch s // steps_per_epoch, b = s % steps_per_epoch, B the
    global batch; of those this rank takes its block. So a run may go on with another number of ranks.

    Parameters
    ----------
    data : DataSet
        Read by the loader's thread only, while it runs.
    config : DataConfig
        Augmentation, shuffling and how many batches to prepare ahead.
    rank, size : int
        Which part.
    first_step, num_steps : int
        Steps to serve.

    Raises
    ------
    DataError
        If the global batch is larger than the data set, or smaller than the number of ranks.
    """

    def __init__(
        self,
        data: DataSet,
        config: DataConfig,
        *,
        global_batch: int,
        seed: int,
        rank: int,
        size: int,
        first_step: int,
        num_steps: int,
    ) -> None:
        if global_batch < size:
            raise DataError(
                f"data: train.global_batch (={global_batch}) is smaller than the number of ranks (={size}); each needs"
                " at least one sample. Use a larger batch or fewer ranks."
            )
        self._data = data
        self._block = config.shuffle_block
        self._seed = seed
        self._augmentation = Augmentation(seed, config.crop_padding, config.flip)
        self._global_batch = global_batch
        self._part = split(global_batch, size, rank)
        self._per_epoch = steps_per_epoch(len(data), global_batch)
        self._order = (-1, np.empty(0, np.int64))
        batches = map(self.load, range(first_step, first_step + num_steps))
        self._batches: Iterator[Batch] = Prefetcher(batches, config.prefetch) if config.prefetch else batches

    def __iter__(self) -> Iterator[Batch]:
        """Return the iterator over the batches; its `next` raises DataError when the rows of a step cannot be read."""
        return self._batches

    def load(self, step: int) -> Batch:
        """Return this rank's batch of a step; not while the loader's thread is at work."""
        epoch, number = divmod(step, self._per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._data), self._seed, epoch, self._block))
        start = number * self._global_batch
        samples = self._order[1][start + self._part.start : start + self._part.stop]
        images, labels = self._data.read(samples)
        images = self._augmentation.apply(images, samples, epoch)
        return Batch(normalise(images, self._data.mean, self._data.std), labels, samples)

    def close(self) -> None:
        """Stop the thread; the data set may be closed afterwards."""
        if isinstance(self._batches, Prefetcher):
            self._batches.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def evaluation_batches(data: DataSet, batch: int, rank: int, size: int) -> Iterator[Batch]:
    """Yield this rank's contiguous part of a data set in order, `batch` images at a time, or nothing."""
    part = split(len(data), size, rank)
    for start in range(part.start, part.stop, batch):
        samples = np.arange(start, min(start + batch, part.stop))
        images, labels = data.read(samples)
        yield Batch(normalise(images, data.mean, data.std), labels, samples)
