"""What a set of labelled images is to everyone else, and one that lies in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from hpcnn.arrays import Pair, Shape
from hpcnn.errors import DataError
from hpcnn.geometry import Block


@dataclass(frozen=True)
class Windows:
    """A piece of h rows and w columns of each of n images, at its own place; what lies outside an image is black."""

    top: np.ndarray
    """int64 (n,): first row of each, negative above the image."""
    left: np.ndarray
    """int64 (n,): first column of each."""
    size: Pair
    """(h, w)."""

    @classmethod
    def whole(cls, num_images: int, image_shape: Shape) -> Windows:
        """Return windows that show all of each image."""
        zeros = np.zeros(num_images, np.int64)
        return cls(zeros, zeros, (image_shape[0], image_shape[1]))

    def are_whole(self, image_shape: Shape) -> bool:
        """Return whether each shows all of its image and nothing else."""
        return self.size == tuple(image_shape[:2]) and not self.top.any() and not self.left.any()

    def cut(self, indices: np.ndarray, image_shape: Shape, rows_of: Callable[[int, Block], np.ndarray]) -> np.ndarray:
        """Return what the windows show of the images of these indices, uint8 (n, h, w, C).

        Parameters
        ----------
        indices : numpy.ndarray, int64 (n,)
        image_shape : (H, W, C)
        rows_of : callable
            Returns some rows of the image of an index, (rows, W, C); called in the order of the indices, with at least
            one row and at most h, and not again before its answer was copied.
        """
        H, W, C = image_shape
        h, w = self.size
        images = np.zeros((len(indices), h, w, C), np.uint8)
        tops, lefts, numbers = self.top.tolist(), self.left.tolist(), np.asarray(indices).tolist()
        for place in np.argsort(indices, kind="stable").tolist():
            top, left = tops[place], lefts[place]
            rows, columns = Block(max(0, top), min(H, top + h)), Block(max(0, left), min(W, left + w))
            if rows.size > 0 and columns.size > 0:
                shown = rows_of(numbers[place], rows)[:, columns.start : columns.stop]
                images[place, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = shown
        return images


class DataSet(Protocol):
    """Labelled images of one shape. Reading is safe from any one thread at a time. A context manager.

    Attributes
    ----------
    image_shape : (H, W, C)
    num_classes : int
    class_names : tuple of str
    mean, std : numpy.ndarray, shape (C,)
        Of the training images' pixels divided by 255, in test sets too.
    """

    image_shape: Shape
    num_classes: int
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, indices: np.ndarray, windows: Windows | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return images and labels, int64 (n,), in the order of `indices`, both the caller's own.

        Images are uint8 (n, H, W, C), or what `windows` show of them, (n, h, w, C); a file is then read no further
        than that takes.

        Raises
        ------
        DataError
            If they cannot be read.
        """

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """Return labels, int64 (n,), without reading images."""

    def fingerprint(self) -> str:
        """Return a short hash that names the set, equal wherever and whenever it is opened."""

    def close(self) -> None:
        """Give files back."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class InMemory:
    """The part of `DataSet` that those without a file share."""

    def close(self) -> None:
        """See `DataSet.close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class MemoryDataSet(InMemory):
    """A data set whose images are in memory.

    Parameters
    ----------
    images : numpy.ndarray, uint8 (N, H, W, C)
    labels : numpy.ndarray, int64 (N,)
    class_names : tuple of str
    mean, std : numpy.ndarray, shape (C,)

    Raises
    ------
    DataError
        If there is not one label an image, or one is no class.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], mean: np.ndarray, std: np.ndarray
    ) -> None:
        self.images, self.labels = images, labels
        self.class_names, self.num_classes = class_names, len(class_names)
        self.mean, self.std = mean, std
        self.image_shape: Shape = images.shape[1:]
        check_labels("data", labels, len(images), len(class_names))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray, windows: Windows | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`."""
        if windows is None:
            return self.images[indices], self.labels[indices]
        cut = windows.cut(indices, self.image_shape, lambda index, rows: self.images[index, rows.start : rows.stop])
        return cut, self.labels[indices]

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `DataSet.labels_of`."""
        return self.labels[indices]

    def fingerprint(self) -> str:
        """See `DataSet.fingerprint`."""
        return fingerprint(self.images.shape, self.labels, self.class_names)


class Subset:
    """Some of the images of a data set, in the order of `rows`; closing it closes the set.

    Parameters
    ----------
    data : DataSet
    rows : numpy.ndarray, int64 (n,)
        Indices in `data`.
    """

    def __init__(self, data: DataSet, rows: np.ndarray) -> None:
        self._data, self.rows = data, rows
        self.image_shape, self.num_classes, self.class_names = data.image_shape, data.num_classes, data.class_names
        self.mean, self.std = data.mean, data.std

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: np.ndarray, windows: Windows | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`."""
        return self._data.read(self.rows[indices], windows)

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `DataSet.labels_of`."""
        return self._data.labels_of(self.rows[indices])

    def fingerprint(self) -> str:
        """Return that of the whole set and of the rows."""
        return hashlib.blake2b(self._data.fingerprint().encode() + self.rows.tobytes(), digest_size=8).hexdigest()

    def close(self) -> None:
        """See `DataSet.close`."""
        self._data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def fingerprint(shape: Shape, labels: np.ndarray, class_names: tuple[str, ...]) -> str:
    """Return 16 hexadecimal digits from the shape of all images, their labels and the names of the classes."""
    digest = hashlib.blake2b(repr((tuple(map(int, shape)), class_names)).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(labels, "<i8").tobytes())
    return digest.hexdigest()


def check_labels(who: str, labels: np.ndarray, num_images: int, num_classes: int) -> None:
    """Raise DataError unless there is one label an image and each is a class."""
    if labels.shape != (num_images,):
        raise DataError(f"{who}: labels of shape {labels.shape} for {num_images} images; there must be one an image.")
    if num_images and not (0 <= labels.min() and labels.max() < num_classes):
        place = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        raise DataError(
            f"{who}: label of image {place} (={int(labels[place])}) is out of range; labels must be at least 0 and"
            f" below the number of classes (={num_classes}). Mend the labels or the class names, and import again."
        )
