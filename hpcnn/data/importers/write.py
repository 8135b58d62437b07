"""From a collection to an HDF5 image file, written by all ranks at once and without parallel HDF5.

Rank 0 makes the file with room for all rows. Each rank decodes its contiguous share of the rows and writes them with
plain `pwrite` at the offset of `/images`. Rank 0 adds mean and deviation, which are quotients of exact integer sums
and so do not depend on the number of ranks, and gives the file its name only when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from hpcnn import rng
from hpcnn.data import hdf5
from hpcnn.data.dataset import check_labels, fingerprint
from hpcnn.data.importers.collection import BrokenImageError, Collection
from hpcnn.data.importers.team import Team, check_same, together
from hpcnn.errors import DataError
from hpcnn.geometry import split

BUFFER_BYTES = 4 << 20
MOST_NAMED = 10
"""Broken images whose names are listed in an error."""

Statistics = tuple[np.ndarray, np.ndarray]
"""Mean and standard deviation per channel, of pixels divided by 255."""


@dataclass(frozen=True)
class Written:
    """What an import has made."""

    path: Path
    num_images: int
    statistics: Statistics
    broken: tuple[str, ...]
    """Images that were left out."""


def write(
    collection: Collection,
    path: Path,
    team: Team,
    *,
    seed: int = 1,
    skip_broken: bool = False,
    statistics: Statistics | None = None,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Write a collection to an HDF5 image file (collective).

    Parameters
    ----------
    seed : int
        Key of the order of the rows, where the collection is sorted by class; otherwise its order is kept.
    skip_broken : bool
        Leave out images that cannot be decoded, rather than refusing.
    statistics : (mean, std), optional
        Those of the training images, for the file of test images; left out: measured.
    progress : callable, optional
        Called with the number of rows that this rank has just written.

    Raises
    ------
    DataError
        On all ranks, if an image is broken or the file cannot be written. No half file is left.
    """
    count = len(collection.labels)
    order = np.arange(count)
    if collection.sorted_by_class:
        order = np.argsort(rng.bits(rng.key(seed, "import"), order), kind="stable")
    labels = collection.labels[order]
    check_labels(f"data: '{collection.source}'", labels, count, len(collection.class_names))
    digest = fingerprint((count, *collection.image_shape), labels, collection.class_names)
    check_same(team, int(digest, 16) >> 2, f"images under '{collection.source}'")
    first, second = (path.with_name(f".{path.name}.{stage}") for stage in ("importing", "packing"))
    try:
        draft = _Draft(collection, labels, first, team)
        flags = draft.fill(order, progress)
        target = draft
        if flags.any():
            broken = np.flatnonzero(flags)
            if not skip_broken or len(broken) == count:
                raise _complaint(collection, order[broken])
            target = _Draft(collection, labels[flags == 0], second, team)
            target.fill_from(draft, np.flatnonzero(flags == 0))
        measured = target.measure() if statistics is None else statistics
        with together(team, f"writing '{path}'"):
            if team.rank == 0:
                hdf5.finish(target.path, *measured)
                os.replace(target.path, path)
        names = tuple(collection.name(int(order[row])) for row in np.flatnonzero(flags))
        return Written(path, len(target.labels), measured, names)
    finally:
        if team.rank == 0:
            for leftover in (first, second):
                with suppress(OSError):
                    leftover.unlink()


def _complaint(collection: Collection, broken: np.ndarray) -> DataError:
    """Return the error that lists the broken images, in the order of the collection, with the reason of the first."""
    reason = ""
    try:
        collection.image(int(broken.min()))
    except BrokenImageError as error:
        reason = f" The first: {error}"
    names = [collection.name(int(index)) for index in np.sort(broken)[:MOST_NAMED]]
    more = f" and {len(broken) - MOST_NAMED} more" if len(broken) > MOST_NAMED else ""
    return DataError(
        f"data: {len(broken)} of {len(collection.labels)} images cannot be decoded: {', '.join(names)}{more}.{reason}"
        " Mend or remove them, or leave them out with --skip-broken (at least one image must remain)."
    )


class _Draft:
    """A file under a temporary name that all ranks write rows to."""

    def __init__(self, collection: Collection, labels: np.ndarray, path: Path, team: Team) -> None:
        self.path, self.labels = path, labels
        self._collection, self._team = collection, team
        self._row_bytes = prod(collection.image_shape)
        self._sums = np.zeros((2, collection.image_shape[2]), np.int64)
        place = np.zeros(1, np.int64)
        with together(team, f"making '{path}'"):
            if team.rank == 0:
                about = {"source": collection.source, "licence": collection.licence}
                place[0] = hdf5.create(
                    path, len(labels), collection.image_shape, collection.class_names, labels, **about
                )
        team.sum(place)
        self._offset = int(place[0])

    def fill(self, order: np.ndarray, progress: Callable[[int], None] | None) -> np.ndarray:
        """Write row r from image order[r] (collective); return int64 (n,), 1 where an image is broken."""
        flags = np.zeros(len(order), np.int64)

        def decode(rows: np.ndarray) -> np.ndarray:
            images = np.zeros((len(rows), *self._collection.image_shape), np.uint8)
            for image, row in zip(images, rows.tolist(), strict=True):
                try:
                    image[...] = self._collection.image(int(order[row]))
                except BrokenImageError:
                    flags[row] = 1
            return images

        self._write(decode, progress)
        self._team.sum(flags)
        return flags

    def fill_from(self, other: _Draft, kept: np.ndarray) -> None:
        """Write row r from row kept[r] of another draft (collective)."""
        with together(self._team, f"reading '{other.path}'"):
            descriptor = os.open(other.path, os.O_RDONLY)
        try:

            def copy(rows: np.ndarray) -> np.ndarray:
                images = np.empty((len(rows), *self._collection.image_shape), np.uint8)
                for image, row in zip(images, kept[rows].tolist(), strict=True):
                    if os.preadv(descriptor, [image.data], other.offset_of(row)) != image.nbytes:
                        raise DataError(f"data: '{other.path}' ends early; the file system lost what was written.")
                return images

            self._write(copy, None)
        finally:
            os.close(descriptor)

    def offset_of(self, row: int) -> int:
        """Return where a row lies in the file, in bytes."""
        return self._offset + row * self._row_bytes

    def measure(self) -> Statistics:
        """Return mean and standard deviation over all rows (collective)."""
        self._team.sum(self._sums)
        count = len(self.labels) * prod(self._collection.image_shape[:2])
        total, squares = self._sums.astype(np.float64) / count
        # Integer pixels: the difference of squares is exact enough. A constant channel must not divide by zero.
        std = np.sqrt(np.maximum(squares - total**2, 0.0)) / 255
        return total / 255, np.maximum(std, 1 / 255)

    def _write(self, make: Callable[[np.ndarray], np.ndarray], progress: Callable[[int], None] | None) -> None:
        """Write this rank's rows, `make(rows)` a buffer at a time (collective)."""
        part = split(len(self.labels), self._team.size, self._team.rank)
        at_once = max(1, BUFFER_BYTES // self._row_bytes)
        with together(self._team, f"writing '{self.path}'"):
            descriptor = os.open(self.path, os.O_WRONLY)
            try:
                for start in range(part.start, part.stop, at_once):
                    rows = np.arange(start, min(start + at_once, part.stop))
                    images = make(rows)
                    self._count(images)
                    _write_all(descriptor, images, self.offset_of(start))
                    if progress is not None:
                        progress(len(rows))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _count(self, images: np.ndarray) -> None:
        """Add pixels and their squares, per channel, exactly."""
        values = np.arange(256, dtype=np.int64)
        for channel in range(images.shape[3]):
            histogram = np.bincount(images[..., channel].reshape(-1), minlength=256)
            self._sums[0, channel] += histogram @ values
            self._sums[1, channel] += histogram @ values**2


def _write_all(descriptor: int, images: np.ndarray, offset: int) -> None:
    left: memoryview = images.reshape(-1).data
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
