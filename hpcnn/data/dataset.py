"""What a set of labelled images is to everyone else, and one that lies in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpcnn.arrays import Shape
from hpcnn.errors import DataError


class DataSet(Protocol):
    """Labelled images of one shape. Reading is safe from any one thread at a time.

    Attributes
    ----------
    image_shape : (H, W, C)
    num_classes : int
    class_names : tuple of str
    mean, std : numpy.ndarray, shape (C,)
        Of the pixels divided by 255.
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

    def fingerprint(self) -> str:
        """Return a short hash that names the set, equal wherever and whenever it is opened."""

    def close(self) -> None:
        """Give files back."""


@dataclass(eq=False)
class MemoryDataSet:
    """A data set whose images are in memory."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray

    def __post_init__(self) -> None:
        self.image_shape: Shape = self.images.shape[1:]
        self.num_classes = len(self.class_names)
        check_labels("data", self.labels, len(self.images), self.num_classes)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`."""
        return self.images[indices], self.labels[indices]

    def fingerprint(self) -> str:
        """See `DataSet.fingerprint`."""
        return fingerprint(self.images.shape, self.labels, self.class_names)

    def close(self) -> None:
        """See `DataSet.close`."""


def fingerprint(shape: Shape, labels: np.ndarray, class_names: tuple[str, ...]) -> str:
    """Return 16 hexadecimal digits from the shape of all images, their labels and the names of the classes."""
    digest = hashlib.blake2b(repr((tuple(map(int, shape)), class_names)).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(labels, np.int64).tobytes())
    return digest.hexdigest()


def check_labels(who: str, labels: np.ndarray, num_images: int, num_classes: int) -> None:
    """Raise DataError unless there is one label an image and each is a class."""
    if labels.shape != (num_images,):
        raise DataError(f"{who}: labels of shape {labels.shape} for {num_images} images; there must be one an image.")
    if num_images and not (0 <= labels.min() and labels.max() < num_classes):
        place = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        raise DataError(
            f"{who}: label of image {place} (={int(labels[place])}) is out of range; labels must be at least 0 and below"
            f" the number of classes (={num_classes}). Mend the labels or the class names, and import again."
        )
