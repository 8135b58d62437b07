"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped."""

from __future__ import annotations

import gzip
import os
import zlib
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from hpcnn import bounded
from hpcnn.data.importers.collection import ArrayCollection
from hpcnn.errors import DataError

PREFIX = {"train": "train", "test": "t10k"}
LARGEST_EXTENT = 1 << 12
LARGEST_UNPACKED_BYTES = 1 << 33
DEFLATE_RATIO = 1032
"""The most that one compressed byte can expand to."""


def find(folder: Path, split: Literal["train", "test"]) -> tuple[Path, Path] | None:
    """Return the files of images and labels of a split in a folder, or None if either is missing."""
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        stem = f"{PREFIX[split]}-{kind}-ubyte"
        names = (f"{stem}.gz", stem, f"{stem.replace('-idx', '.idx')}.gz", stem.replace("-idx", ".idx"))
        found += [path for path in (folder / name for name in names) if path.is_file()][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def load(
    images: Path, labels: Path, class_names: tuple[str, ...] = (), *, source: str = "", licence: str = ""
) -> ArrayCollection:
    """Return what a pair of IDX files holds.

    Parameters
    ----------
    class_names : tuple of str, optional
        Left out: the numbers from 0 to the largest label.

    Raises
    ------
    DataError
        If a file is missing, truncated, no IDX, or the two do not belong together.
    """
    pixels, answers = read(images, 3)[..., None], read(labels, 1).astype(np.int64)
    if len(pixels) != len(answers) or not len(pixels):
        raise DataError(
            f"data: '{images}' has {len(pixels)} images and '{labels}' {len(answers)} labels; there must be one label"
            " an image. Copy both files again."
        )
    return ArrayCollection(
        images=pixels,
        labels=answers,
        class_names=class_names or tuple(map(str, range(int(answers.max()) + 1))),
        source=source or str(images),
        licence=licence,
    )


def read(path: Path, num_dims: int) -> np.ndarray:
    """Return the array of bytes in an IDX file, uint8 with `num_dims` dimensions; raises DataError."""
    try:
        with bounded.opened(path) as file:
            size, zipped = os.fstat(file.fileno()).st_size, file.read(2) == b"\x1f\x8b"
            file.seek(0)
            # It cannot be longer than this: a header that claims more is refused before memory is taken.
            most = min(size * DEFLATE_RATIO, LARGEST_UNPACKED_BYTES) if zipped else size
            return _parse(gzip.GzipFile(fileobj=file) if zipped else file, path, num_dims, most)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise DataError(f"data: '{path}' does not exist. Fetch it with `hpcnn data fetch`.") from None
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"data: '{path}' is damaged or truncated ({error}). Copy or download it again.") from None


def _parse(stream: BinaryIO, path: Path, num_dims: int, most: int) -> np.ndarray:
    header = stream.read(4 + 4 * num_dims)
    if header[:4] != bytes((0, 0, 8, num_dims)) or len(header) != 4 + 4 * num_dims:
        raise DataError(
            f"data: '{path}' is no IDX file of bytes in {num_dims} dimensions: it begins with"
            f" {header[:4].hex() or 'nothing'}, not {bytes((0, 0, 8, num_dims)).hex()}."
            " Check that images and labels are not mixed up."
        )
    shape = tuple(int(extent) for extent in np.frombuffer(header, ">u4", offset=4))
    expected = prod(shape)
    if expected > most or any(not 0 < extent <= LARGEST_EXTENT for extent in shape[1:]):
        raise DataError(f"data: '{path}' claims {shape} bytes, more than it can hold. Copy or download it again.")
    data = stream.read(expected + 1)
    if len(data) != expected:
        less = "fewer" if len(data) < expected else "more"
        raise DataError(f"data: '{path}' holds {less} bytes than its shape {shape} says. Copy or download it again.")
    return np.frombuffer(data, np.uint8).reshape(shape)
