"""The HDF5 image file: `/images` uint8 (N, H, W, C), `/labels` int64 (N,), and what they mean as attributes.

Attributes of the root: `format`, `version`, `class_names` (one text, a name a line), `mean` and `std` per channel of
the *training* pixels divided by 255, `source`, `licence`. Files by others need only the two datasets: classes are then
numbered, mean is .5 and std .25.

Images lie contiguous and uncompressed: an image, or some rows of it, is then one `preadv` at a known offset, tens of
times faster than through the chunk machinery, on every rank at once and without a lock. Files whose images are chunked
or compressed are read into memory whole if they are small.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from hpcnn import bounded
from hpcnn.arrays import Shape
from hpcnn.data.dataset import Windows, check_labels, fingerprint
from hpcnn.errors import DataError
from hpcnn.geometry import Block

FORMAT, VERSION = "hpcnn-images", 1
# The oldest structures that carry checksums: the library finds damage instead of following it. Any HDF5 since 1.8
# reads them, and attributes may be longer than 64 KiB.
STRUCTURES = ("v108", "v108")
LARGEST_IN_MEMORY_BYTES = 1 << 30
LARGEST_EXTENT = 1 << 16
MOST_CHANNELS = 1 << 10
MOST_CLASSES = 1 << 20
MOST_IMAGES = 1 << 30


class Hdf5DataSet:
    """A data set in one HDF5 file, opened for reading by this process alone; see `DataSet`.

    Attributes
    ----------
    contiguous : bool
        Whether images are read from the file when asked for; otherwise all are in memory.
    about : dict of str
        "source" and "licence", empty when unknown.

    Raises
    ------
    DataError
        If the file is missing, truncated, no HDF5, or not of the format above.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._who = f"data: '{self.path}'"
        self._descriptor: int | None = None
        self._in_memory: np.ndarray | None = None
        with refusals(self.path), opened(self.path) as file:
            _check_version(file, self._who)
            images, labels = self._datasets(file)
            self.image_shape: Shape = tuple(int(extent) for extent in images.shape[1:])
            self.labels = labels[...].astype(np.int64)
            self.class_names = _names(bounded.attribute(file, "class_names", ()))
            if not self.class_names:
                # A label of a damaged file may be any number; a wrong one is found below.
                self.class_names = tuple(map(str, range(min(int(self.labels.max()) + 1, MOST_CLASSES))))
            if len(self.class_names) > MOST_CLASSES:
                raise DataError(f"{self._who} names {len(self.class_names)} classes; at most {MOST_CLASSES} can be.")
            self.mean = self._per_channel(file, "mean", 0.5)
            self.std = self._per_channel(file, "std", 0.25)
            self.about = {name: _text(bounded.attribute(file, name, "")) for name in ("source", "licence")}
            self._offset = images.id.get_offset()
            self.contiguous = self._offset is not None
            if self.contiguous:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            else:
                self._in_memory = images[...]
        self.num_classes = len(self.class_names)
        self._image_bytes = prod(self.image_shape)
        try:
            check_labels(self._who, self.labels, len(self.labels), self.num_classes)
        except DataError:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, windows: Windows | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`; the file is read from front to back, and whole images that are neighbours at once."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"{self._who}: indices {indices.min()} to {indices.max()} of {len(self)} images.")
        if windows is not None:
            images = windows.cut(indices, self.image_shape, self._rows(windows.size[0]))
        elif self._in_memory is not None:
            images = self._in_memory[indices]
        else:
            images = self._whole(indices)
        return images, self.labels[indices]

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `DataSet.labels_of`."""
        return self.labels[indices]

    def fingerprint(self) -> str:
        """See `DataSet.fingerprint`."""
        return fingerprint((len(self), *self.image_shape), self.labels, self.class_names)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _whole(self, indices: np.ndarray) -> np.ndarray:
        """Read whole images, neighbours at once."""
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        flat = images.reshape(len(indices), self._image_bytes)
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        starts = np.array([0, *breaks] if len(indices) else [], np.int64)
        stops = np.array([*breaks, len(indices)])
        for run in np.argsort(indices[starts], kind="stable").tolist():
            self._fill(flat[starts[run] : stops[run]].reshape(-1), int(indices[starts[run]]))
        return images

    def _rows(self, most_rows: int) -> Callable[[int, Block], np.ndarray]:
        """Return a function that returns some rows of an image, (rows, W, C), at most so many, until called again."""
        images = self._in_memory
        if images is not None:
            return lambda index, rows: images[index, rows.start : rows.stop]
        _, W, C = self.image_shape
        # One buffer and a copy out of it take a third of the time of a `preadv` that scatters the columns.
        buffer = np.empty(most_rows * W * C, np.uint8)

        def read(index: int, rows: Block) -> np.ndarray:
            values = buffer[: rows.size * W * C]
            self._fill(values, index, rows.start * W * C)
            return values.reshape(rows.size, W, C)

        return read

    def _fill(self, values: np.ndarray, first: int, skipped: int = 0) -> None:
        """Fill `values`, uint8 (bytes,), from the file: image `first` and those behind it, without some first bytes."""
        if self._descriptor is None:
            raise DataError(f"{self._who} is closed; images are read while it is open.")
        target: memoryview = values.data
        offset = int(self._offset) + first * self._image_bytes + skipped
        while target:
            try:
                got = os.preadv(self._descriptor, [target], offset)
            except OSError as error:
                raise DataError(f"{self._who} cannot be read: {error.strerror}. Check the file system.") from None
            if got == 0:
                raise DataError(
                    f"{self._who} ends inside image {first}; it was cut short after it was opened. Copy it again."
                )
            target, offset = target[got:], offset + got

    def _datasets(self, file: h5py.File) -> tuple[h5py.Dataset, h5py.Dataset]:
        """Return the two datasets after a look at their types and shapes, before any memory is taken for them."""
        for name in ("images", "labels"):
            # A link into another file would be read at this file's offsets, or lead anywhere on the disk.
            link = file.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
                raise DataError(
                    f"{self._who} has no dataset '/{name}' of its own; an image file needs /images and /labels. Make"
                    " one with `hpcnn data import`."
                )
        images, labels = file["images"], file["labels"]
        if images.dtype != np.uint8 or images.ndim != 4:
            raise DataError(f"{self._who}: /images is {images.dtype} {images.shape}; it must be uint8 (N, H, W, C).")
        count, rows, columns, channels = images.shape
        if labels.dtype.kind not in "iu" or labels.shape != (count,):
            raise DataError(
                f"{self._who}: /labels is {labels.dtype} {labels.shape}; it must be integers ({count},), one an image."
            )
        if not (
            0 < count <= MOST_IMAGES
            and 0 < rows <= LARGEST_EXTENT
            and 0 < columns <= LARGEST_EXTENT
            and 0 < channels <= MOST_CHANNELS
        ):
            raise DataError(
                f"{self._who}: /images has shape {images.shape}; it needs images, at most {LARGEST_EXTENT} pixels high"
                f" and wide and {MOST_CHANNELS} channels deep. Make the file again with `hpcnn data import`."
            )
        for dataset in (images, labels):
            self._check_storage(dataset)
        return images, labels

    def _check_storage(self, dataset: h5py.Dataset) -> None:
        """Raise DataError unless the values are in this file, whole, or small enough to be unpacked from it."""
        num_bytes, offset = prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_offset()
        size = self.path.stat().st_size
        if offset is not None and offset + num_bytes > size:
            raise DataError(f"{self._who} is truncated: {dataset.name} ends behind its {size} bytes. Copy it again.")
        if offset is None and (dataset.chunks is None or dataset.external or dataset.is_virtual):
            raise DataError(f"{self._who}: {dataset.name} has no values in this file. Make one that holds its images.")
        if dataset.chunks is not None:  # a chunk may claim more than the whole, and is unpacked whole
            num_bytes = max(num_bytes, prod(dataset.chunks) * dataset.dtype.itemsize)
        if offset is None and num_bytes > LARGEST_IN_MEMORY_BYTES:
            raise DataError(
                f"{self._who}: {dataset.name} is chunked or compressed and {num_bytes >> 20} MiB large; beyond"
                f" {LARGEST_IN_MEMORY_BYTES >> 20} MiB it must be contiguous. Rewrite it: h5repack -l CONTI OLD NEW."
            )

    def _per_channel(self, file: h5py.File, name: str, default: float) -> np.ndarray:
        channels = self.image_shape[2]
        values = np.asarray(bounded.attribute(file, name, np.full(channels, default)), np.float32).reshape(-1)
        if values.shape != (channels,) or not np.isfinite(values).all() or (name == "std" and not (values > 0).all()):
            raise DataError(
                f"{self._who}: attribute '{name}' (={values.tolist()}) must be {channels} finite numbers, one a"
                " channel, and std positive. Make the file again with `hpcnn data import`."
            )
        return values


def create(
    path: Path, num_images: int, image_shape: Shape, class_names: tuple[str, ...], labels: np.ndarray, **about: str
) -> int:
    """Make a file with room for all images and return the offset of the first byte of `/images` in it.

    Rows are then written by anyone with `os.pwrite`; `finish` adds mean and std. `path` should be a temporary name.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    with h5py.File(path, "w", locking=False, libver=STRUCTURES) as file:
        file.attrs["version"] = VERSION
        names = "\n".join(" ".join(name.split()) for name in class_names)
        for name, value in {"format": FORMAT, "class_names": names, **about}.items():
            # Of fixed length: texts of variable length lie in a heap that has no checksum.
            text = value.encode(errors="replace") or b" "  # names of files may be no text at all
            file.attrs.create(name, text, dtype=h5py.string_dtype("utf-8", len(text)))
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        layout.set_obj_track_times(False)
        space = h5py.h5s.create_simple((num_images, *image_shape))
        images = h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, layout)
        file.create_dataset("labels", data=np.asarray(labels, np.int64), track_times=False)
        file.flush()
        return int(images.get_offset())


def finish(path: Path, mean: np.ndarray, std: np.ndarray) -> None:
    """Add mean and std, per channel of pixels divided by 255, and flush the file to the disk."""
    with h5py.File(path, "r+", locking=False, libver=STRUCTURES) as file:
        file.attrs["mean"], file.attrs["std"] = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def opened(path: Path) -> h5py.File:
    """Open an HDF5 file for reading; raises OSError for pipes and devices, which the library would wait for."""
    bounded.require_regular(path)
    return h5py.File(path, "r", locking=False)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn whatever a missing or damaged file causes in the HDF5 library into a DataError."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"data: '{path}' does not exist. Make it with `hpcnn data import` or `hpcnn data fetch`, or mend"
            " data.source."
        ) from None
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"data: '{path}' cannot be opened: {error.strerror}. It must be a readable file.") from None
    except Exception as error:  # h5py raises nearly every built-in type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data: '{path}' is truncated, damaged or no HDF5 file ({reason}). Copy it again.") from None


def _check_version(file: h5py.File, who: str) -> None:
    version = VERSION
    if _text(bounded.attribute(file, "format", "")) == FORMAT:
        version = int(bounded.attribute(file, "version", VERSION))
    if version > VERSION:
        raise DataError(f"{who} is of version {version} of its format; this hpcnn reads up to {VERSION}. Update hpcnn.")


def _names(value: Any) -> tuple[str, ...]:
    """Return class names from one text, a name a line, or from an array of texts."""
    if isinstance(value, str | bytes):
        return tuple(_text(value).split("\n"))
    return tuple(_text(name) for name in value)


def _text(value: Any) -> str:
    return (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).strip()
