"""One class against all others: rows of a data set with two labels, as many of either; and rows to hold out."""

from __future__ import annotations

import numpy as np

from hpcnn import rng
from hpcnn.data.dataset import DataSet, InMemory, Windows, fingerprint
from hpcnn.errors import DataError


class OneClass(InMemory):
    """Rows of a data set in which a class has label 1 and all others 0; the classes take turns, so both are equal.

    Rows of the rarer kind come again until there are as many as of the other.

    Parameters
    ----------
    data : DataSet
        Who opened it closes it.
    rows : ndarray of int, shape (n,)
    index : int
        The class.
    balanced : bool
        False: the rows as they are given.

    Raises
    ------
    DataError
        If all rows are of the class, or none is.
    """

    def __init__(self, data: DataSet, rows: np.ndarray, index: int, *, balanced: bool = True) -> None:
        own = data.labels_of(rows) == index
        if own.all() or not own.any():
            raise DataError(
                f"data: of {len(rows)} training images {int(own.sum())} are of class {index}"
                f" ('{data.class_names[index]}'); a network for one class needs images of it and of others. Import a"
                " set with images of each class."
            )
        if balanced:
            count = max(int(own.sum()), int((~own).sum()))
            rows = np.stack([np.resize(rows[~own], count), np.resize(rows[own], count)], axis=1).reshape(-1)
        self._data, self._rows, self._index = data, rows, index
        self.image_shape, self.mean, self.std = data.image_shape, data.mean, data.std
        self.num_classes = 2
        self.class_names: tuple[str, ...] = ("another", data.class_names[index])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: np.ndarray, windows: Windows | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`."""
        images, labels = self._data.read(self._rows[indices], windows)
        return images, (labels == self._index).astype(np.int64)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `DataSet.labels_of`."""
        return (self._data.labels_of(self._rows[indices]) == self._index).astype(np.int64)

    def fingerprint(self) -> str:
        """See `DataSet.fingerprint`."""
        shape = (len(self), *self.image_shape)
        names = (self._data.fingerprint(), *self.class_names)
        return fingerprint(shape, self.labels_of(np.arange(len(self))), names)


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those held out: of each class that share, drawn by `seed`, at least one of two.

    Both ascend, int64.
    """
    drawn = rng.bits(rng.key(seed, "rows held out", 0), np.arange(len(labels)))
    held = np.zeros(len(labels), bool)
    for index in np.unique(labels):
        rows = np.flatnonzero(labels == index)
        count = max(1, round(share * len(rows))) if len(rows) > 1 else 0
        held[rows[np.argsort(drawn[rows], kind="stable")][:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
