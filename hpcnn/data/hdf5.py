"""The HDF5 image file: `/images` uint8 (N, H, W, C), `/labels` int64 (N,), and what they mean as attributes.

Images lie contiguous and uncompressed: a row is then one `pread` at a known offset, tens of times faster than through
the chunk machinery, on every rank at once and without a lock. Files of others whose images are chunked or compressed
are read into memory whole if they are small.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hpcnn.arrays import Shape
from hpcnn.data.dataset import check_labels, fingerprint
from hpcnn.errors import DataError

FORMAT, VERSION = "hpcnn-images", 1
LARGEST_IN_MEMORY_BYTES = 1 << 30
LARGEST_EXTENT = 1 << 16
MOST_CHANNELS = 1 << 10


class Hdf5DataSet:
    """A data set in one HDF5 file, opened for reading by this process alone.

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
        import h5py

        with refusals(self.path), h5py.File(self.path, "r", locking=False) as file:
            images, labels = self._datasets(file)
            self.image_shape: Shape = tuple(int(extent) for extent in images.shape[1:])
            self._labels = labels[...].astype(np.int64)
            self.class_names = tuple(_text(name) for name in file.attrs.get("class_names", ()))
            if not self.class_names:
                self.class_names = tuple(map(str, range(int(self._labels.max(initial=-1)) + 1)))
            self.mean = self._per_channel(file, "mean", 0.5)
            self.std = self._per_channel(file, "std", 0.25)
            self.about = {name: _text(file.attrs.get(name, "")) for name in ("source", "licence")}
            self._row_bytes = prod(self.image_shape)
            self._offset = images.id.get_offset()
            self.contiguous = self._offset is not None
            if not self.contiguous:
                self._in_memory = self._read_all(images)
        self.num_classes = len(self.class_names)
        check_labels(self._who, self._labels, len(self._labels), self.num_classes)
        if self.contiguous:
            self._descriptor = os.open(self.path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> np.ndarray:
        """All labels, int64 (N,)."""
        return self._labels

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`; neighbouring rows are read at once."""
        if self._in_memory is not None:
            return self._in_memory[indices], self._labels[indices]
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        rows = images.reshape(len(indices), -1)
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), len(indices)]
        for start, stop in zip(starts, stops, strict=True):
            if start < stop:
                self._read_run(rows[start:stop], int(indices[start]))
        return images, self._labels[indices]

    def fingerprint(self) -> str:
        """See `DataSet.fingerprint`."""
        return fingerprint((len(self), *self.image_shape), self._labels, self.class_names)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Hdf5DataSet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_run(self, rows: np.ndarray, first: int) -> None:
        if self._descriptor is None:
            raise DataError(f"{self._who} is closed.")
        target = memoryview(rows.reshape(-1))
        offset = int(self._offset) + first * self._row_bytes
        while target:
            try:
                got = os.preadv(self._descriptor, [target], offset)
            except OSError as error:
                raise DataError(f"{self._who} cannot be read: {error.strerror}. Check the file system.") from None
            if got == 0:
                raise DataError(f"{self._who} ends inside image {first}; it must hold all rows. Copy it again.")
            target, offset = target[got:], offset + got

    def _datasets(self, file: Any) -> tuple[Any, Any]:
        """Return the two datasets after a look at their types and shapes, before any memory is taken for them."""
        import h5py

        for name in ("images", "labels"):
            if not isinstance(file.get(name), h5py.Dataset):
                raise DataError(
                    f"{self._who} has no dataset '/{name}'; it is no image file. Make one by `data import`."
                )
        images, labels = file["images"], file["labels"]
        if images.dtype != np.uint8 or images.ndim != 4:
            raise DataError(f"{self._who}: /images is {images.dtype} {images.shape}; it must be uint8 (N, H, W, C).")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise DataError(
                f"{self._who}: /labels is {labels.dtype} {labels.shape}; it must be integers ({images.shape[0]},), one"
                " an image."
            )
        _, rows, columns, channels = images.shape
        if not (0 < rows <= LARGEST_EXTENT and 0 < columns <= LARGEST_EXTENT and 0 < channels <= MOST_CHANNELS):
            raise DataError(f"{self._who}: images of {images.shape[1:]} are beyond reason; the file is damaged.")
        size = self.path.stat().st_size
        for dataset in (images, labels):
            num_bytes, offset = prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_offset()
            if offset is not None and num_bytes and offset + num_bytes > size:
                raise DataError(
                    f"{self._who} is truncated: {dataset.name} ends behind its {size} bytes. Copy it again."
                )
        return images, labels

    def _per_channel(self, file: Any, name: str, default: float) -> np.ndarray:
        channels = self.image_shape[2]
        values = np.asarray(file.attrs.get(name, np.full(channels, default)), np.float32).reshape(-1)
        if values.shape != (channels,) or not np.isfinite(values).all() or (name == "std" and not (values > 0).all()):
            raise DataError(
                f"{self._who}: attribute '{name}' (={values.tolist()}) must be {channels} positive numbers."
            )
        return values

    def _read_all(self, images: Any) -> np.ndarray:
        num_bytes = prod(images.shape)
        if num_bytes > LARGEST_IN_MEMORY_BYTES:
            raise DataError(
                f"{self._who}: /images is chunked or compressed and {num_bytes >> 20} MiB large; files over"
                f" {LARGEST_IN_MEMORY_BYTES >> 20} MiB must be contiguous. Import them again with `hpcnn data import`."
            )
        return np.asarray(images[...])


def create(
    path: Path, num_images: int, image_shape: Shape, class_names: tuple[str, ...], labels: np.ndarray, **about: str
) -> int:
    """Make a file with room for all images and return the offset of the first byte of `/images` in it.

    Rows are then written by anyone with `os.pwrite`; `finish` adds mean and std. `path` should be a temporary name.
    """
    import h5py

    with h5py.File(path, "w", locking=False) as file:
        file.attrs["format"], file.attrs["version"] = FORMAT, VERSION
        file.attrs["class_names"] = list(class_names)
        for name, value in about.items():
            file.attrs[name] = value
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        space = h5py.h5s.create_simple((num_images, *image_shape))
        images = h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, layout)
        file.create_dataset("labels", data=np.asarray(labels, np.int64))
        file.flush()
        offset = images.get_offset()
    if offset is None:
        raise DataError(f"data: '{path}': the HDF5 library gave /images no place. Nothing was written.")
    return int(offset)


def finish(path: Path, mean: np.ndarray, std: np.ndarray) -> None:
    """Add mean and std, per channel of pixels divided by 255, and flush the file to the disk."""
    import h5py

    with h5py.File(path, "r+", locking=False) as file:
        file.attrs["mean"], file.attrs["std"] = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file causes in the HDF5 library into a DataError."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"data: '{path}' does not exist. Make it with `hpcnn data import` or `hpcnn data fetch`, or mend data.source."
        ) from None
    except Exception as error:  # h5py raises nearly every built-in type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data: '{path}' is truncated, damaged or no HDF5 file ({reason}). Copy it again.") from None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
