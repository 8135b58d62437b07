"""A tree of image files, one folder a class: `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, as ImageNet comes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from hpcnn import bounded
from hpcnn.arrays import Shape
from hpcnn.data.importers.collection import BrokenImageError
from hpcnn.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")
FORMATS = ("JPEG", "PNG")
"""Whatever a file is called: others bring programs along (EPS), and decoders that few have looked at."""
LARGEST_NAMES_BYTES = 16 << 20
MOST_PIXELS = 1 << 28
"""A larger picture is taken for broken: a small file can claim any size."""


class FolderCollection:
    """The image files under the class folders of `root`; see `Collection`. Always three channels.

    Parameters
    ----------
    root : Path
        Folder of the class folders.
    size : int, optional
        Rows and columns to make of each image: its largest centred square, scaled. Left out: all images must be of one
        size already.
    classes : tuple of str, optional
        Class folders in the order of their labels, which other files share; left out: those of `root`, sorted.
    names : dict, optional
        Readable names by class folder.

    Raises
    ------
    DataError
        If there are no class folders, no images, or a folder that is no class.
    """

    sorted_by_class = True
    licence = ""

    def __init__(
        self,
        root: Path,
        size: int | None = None,
        classes: tuple[str, ...] | None = None,
        names: dict[str, str] | None = None,
    ) -> None:
        check_pillow()
        self.source = str(root)
        found = sorted(entry.name for entry in _scan(root) if entry.is_dir() and not entry.name.startswith("."))
        self.classes = tuple(found) if classes is None else classes
        unknown = sorted(set(found) - set(self.classes))
        if not found or unknown:
            raise DataError(
                f"data: '{root}' has no folder that is a class."
                if not found
                else f"data: '{root}': class folder '{unknown[0]}' is not among the {len(self.classes)} training"
                " classes; test images need the same folders. Rename or remove it."
            )
        self.class_names = tuple((names or {}).get(name, name) for name in self.classes)
        self._files: list[str] = []
        labels = []
        for label, name in enumerate(self.classes):
            files = _image_files(root / name) if name in found else []
            self._files += files
            labels += [label] * len(files)
        if not self._files:
            raise DataError(f"data: no images under '{root}'; class folders must hold {', '.join(SUFFIXES)} files.")
        self.labels = np.array(labels, np.int64)
        self._size = size
        self.image_shape: Shape = (size, size, 3) if size else self._first_shape()

    def name(self, index: int) -> str:
        """See `Collection.name`."""
        return self._files[index]

    def image(self, index: int) -> np.ndarray:
        """See `Collection.image`; greyscale, palette and CMYK pictures become RGB."""
        image = decode(self._files[index], self._size)
        if image.shape != self.image_shape:
            raise DataError(
                f"data: '{self._files[index]}' has {image.shape[0]}x{image.shape[1]} pixels, others have"
                f" {self.image_shape[0]}x{self.image_shape[1]}; images must be of one size. Add --size N to scale them."
            )
        return image

    def _first_shape(self) -> Shape:
        for index in range(len(self._files)):
            try:
                return tuple(decode(self._files[index], None).shape)
            except BrokenImageError:
                continue
        raise DataError(f"data: none of the {len(self._files)} images under '{self.source}' can be decoded.")


def decode(path: str, size: int | None) -> np.ndarray:
    """Return the picture in a file as RGB, uint8 (H, W, 3); with `size`, its centred square scaled to that.

    Raises
    ------
    BrokenImageError
        If it is no picture, damaged, truncated, or absurdly large.
    """
    from PIL import Image

    try:
        # Pillow warns of what it then decodes, or refuses by an exception.
        with bounded.opened(path) as file, warnings.catch_warnings(), Image.open(file, formats=FORMATS) as picture:
            warnings.simplefilter("ignore")
            columns, rows = picture.size
            if columns * rows > MOST_PIXELS:
                raise BrokenImageError(f"data: '{path}' claims {columns}x{rows} pixels.")
            rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
            if size is not None and (rows, columns) != (size, size):
                side = min(rows, columns)
                left, top = (columns - side) / 2, (rows - side) / 2
                square = (left, top, left + side, top + side)
                rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box=square)
            return np.asarray(rgb)
    except BrokenImageError:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly every built-in type
        raise BrokenImageError(f"data: '{path}' cannot be decoded ({error}).") from None


def read_names(root: Path) -> dict[str, str]:
    """Return readable names by class folder from `classes.tsv` (folder, tab, name), or none where there is no such."""
    try:
        text = bounded.text(root / "classes.tsv", LARGEST_NAMES_BYTES)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data: cannot read '{root / 'classes.tsv'}': {error}.") from None
    pairs = (line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    return {folder.strip(): name.strip() for folder, name in pairs}


def check_pillow() -> None:
    """Raise DataError unless Pillow can be imported."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise DataError(
            "data: decoding image files needs Pillow, which is not installed. Install it: pip install 'hpcnn[images]'."
        ) from None


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"data: cannot list '{folder}': {error.strerror}.") from None


def _image_files(folder: Path) -> list[str]:
    """Return the image files under a folder, nested ones too, in an order that every rank finds."""
    return sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )
