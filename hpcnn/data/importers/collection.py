"""What an importer hands over: labelled images that lie in somebody else's format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpcnn.arrays import Shape
from hpcnn.errors import DataError


class BrokenImageError(DataError):
    """One image among many that cannot be decoded; an import may be told to do without it."""


class Collection(Protocol):
    """Labelled images of one shape, one split of a data set.

    Attributes
    ----------
    image_shape : (H, W, C)
    class_names : tuple of str
    labels : numpy.ndarray, int64 (n,)
    sorted_by_class : bool
        Whether neighbours are of one class, so that rows should be shuffled on import.
    source, licence : str
        Where the images come from and what they may be used for; empty when unknown.
    """

    image_shape: Shape
    class_names: tuple[str, ...]
    labels: np.ndarray
    sorted_by_class: bool
    source: str
    licence: str

    def image(self, index: int) -> np.ndarray:
        """Return image `index`, uint8 (H, W, C); raises BrokenImageError."""

    def name(self, index: int) -> str:
        """Return what people call image `index`: its file."""


@dataclass(eq=False, kw_only=True)
class ArrayCollection:
    """Images that fit into memory."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    source: str
    licence: str = ""
    sorted_by_class: bool = False

    def __post_init__(self) -> None:
        self.image_shape: Shape = self.images.shape[1:]

    def image(self, index: int) -> np.ndarray:
        """See `Collection.image`."""
        return self.images[index]

    def name(self, index: int) -> str:
        """See `Collection.name`."""
        return f"image {index} of {self.source}"
