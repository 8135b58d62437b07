"""One rank's part of every batch, prepared ahead by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hpcnn.arrays import Shape
from hpcnn.config import DataConfig
from hpcnn.data.augment import Augmentation, normalise
from hpcnn.data.dataset import DataSet
from hpcnn.data.prefetch import Prefetcher
from hpcnn.data.sampler import epoch_order, steps_per_epoch
from hpcnn.geometry import Block


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    images: np.ndarray
    """float32 (n, h, w, C), normalised: this rank's samples, rows and columns."""
    labels: np.ndarray
    """int64 (m,): of the samples whose loss this rank computes."""
    samples: np.ndarray
    """int64 (N,): index of each image of the whole batch in its data set."""


class Part(NamedTuple):
    """What of a global batch one rank reads: images by positions, rows and columns, and labels by positions."""

    samples: Block
    rows: Block
    columns: Block
    labels: Block

    @classmethod
    def whole(cls, num_samples: int, image_shape: Shape) -> Part:
        """Return all of a batch."""
        samples, rows, columns = (Block(0, size) for size in (num_samples, *image_shape[:2]))
        return cls(samples, rows, columns, samples)


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
    part : Part
        What this rank needs of each batch.
    first_step, num_steps : int
        Steps to serve.
    rows : numpy.ndarray of int64, optional
        The only samples of `data` to serve; left out: all.
    share : Block, optional
        Positions in every global batch that make up the batch here, of whose samples `part` speaks; left out: all.

    Raises
    ------
    DataError
        If the global batch is larger than the data set.
    """

    def __init__(
        self,
        data: DataSet,
        config: DataConfig,
        *,
        global_batch: int,
        seed: int,
        part: Part,
        first_step: int,
        num_steps: int,
        rows: np.ndarray | None = None,
        share: Block | None = None,
    ) -> None:
        self._data = data
        self._block = config.shuffle_block
        self._seed = seed
        self._augmentation = Augmentation(seed, config.crop_padding, config.flip)
        self._global_batch = global_batch
        self._part = part
        self._rows = rows
        self._share = slice(None) if share is None else slice(*share)
        self._num_samples = len(data) if rows is None else len(rows)
        self._per_epoch = steps_per_epoch(self._num_samples, global_batch)
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
            order = epoch_order(self._num_samples, self._seed, epoch, self._block)
            self._order = (epoch, order if self._rows is None else self._rows[order])
        start = number * self._global_batch
        samples = self._order[1][start : start + self._global_batch][self._share]
        return _read(self._data, samples, self._part, self._augmentation, epoch)

    def close(self) -> None:
        """Stop the thread; the data set may be closed afterwards."""
        if isinstance(self._batches, Prefetcher):
            self._batches.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def evaluation_batches(data: DataSet, batch: int, part: Callable[[int], Part]) -> Iterator[Batch]:
    """Yield a data set in order, `batch` images at a time over all ranks; `part` tells what of N images to read."""
    for start in range(0, len(data), batch):
        samples = np.arange(start, min(start + batch, len(data)))
        yield read_samples(data, samples, part(len(samples)))


def read_samples(data: DataSet, samples: np.ndarray, part: Part) -> Batch:
    """Return a rank's part of the batch of `samples`, indices in the data set, without augmentation."""
    return _read(data, samples, part, Augmentation(seed=0), epoch=0)


def _read(data: DataSet, samples: np.ndarray, part: Part, augmentation: Augmentation, epoch: int) -> Batch:
    """Return a rank's part of the batch of `samples`."""
    own = samples[slice(*part.samples)]
    images = augmentation.read(data, own, epoch, part.rows, part.columns)
    labels = data.labels_of(samples[slice(*part.labels)])
    return Batch(normalise(images, data.mean, data.std), labels, samples)
