"""What a set of labelled images is to everyone else, and one that lies in memory."""

from __future__ import annotations

import hashlib
from typing import Protocol, Self

import numpy as np

from hpcnn.arrays import Shape
from hpcnn.errors import DataError


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

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images, uint8 (n, H, W, C), and labels, int64 (n,), in the order of `indices`; raises DataError."""

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

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`."""
        return self.images[indices], self.labels[indices]

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `DataSet.labels_of`."""
        return self.labels[indices]

    def fingerprint(self) -> str:
        """See `DataSet.fingerprint`."""
        return fingerprint(self.images.shape, self.labels, self.class_names)


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
