"""CIFAR-10 and CIFAR-100 in their *binary* version, a folder or the tar.gz as published. The pickled one is refused."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hpcnn import bounded
from hpcnn.data.importers.collection import ArrayCollection
from hpcnn.errors import DataError

ROWS = COLUMNS = 32
CHANNELS = 3
IMAGE_BYTES = ROWS * COLUMNS * CHANNELS
LARGEST_FILE_BYTES = 1 << 28
LARGEST_ARCHIVE_BYTES = 1 << 29
"""Unpacked; CIFAR has 184 MB."""


class Kind(NamedTuple):
    """One of the two sets: files by split, file of class names, label bytes before an image, and which one counts."""

    title: str
    files: dict[str, tuple[str, ...]]
    names: str
    num_classes: int
    label_bytes: int


KINDS = (
    Kind(
        "CIFAR-10",
        {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        10,
        1,
    ),
    Kind("CIFAR-100", {"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", 100, 2),
)
WANTED = {name for kind in KINDS for files in kind.files.values() for name in files} | {kind.names for kind in KINDS}


def is_cifar(source: Path) -> bool:
    """Return whether a folder or archive looks like CIFAR in the binary version."""
    if source.is_dir():
        return any((source / name).is_file() for kind in KINDS for name in kind.files["test"])
    return source.name.endswith((".tar.gz", ".tgz", ".tar"))


def load(source: Path) -> dict[str, ArrayCollection]:
    """Return the splits, "train" and "test", of a folder or archive, as far as they are there.

    Nothing is unpacked to the disk: of an archive only regular members with the published base names are read.

    Raises
    ------
    DataError
        If files are missing, truncated, or not of the binary version.
    """
    files = _from_folder(source) if source.is_dir() else _from_archive(source)
    for kind in KINDS:
        present = {split: [name for name in names if name in files] for split, names in kind.files.items()}
        if not any(present.values()):
            continue
        for split, names in kind.files.items():
            missing = sorted(set(names) - set(present[split]))
            if missing and present[split]:
                raise DataError(f"data: '{source}' lacks {', '.join(missing)} of {kind.title}. Download it again.")
        class_names = _class_names(kind, files.get(kind.names), source)
        return {
            split: _decode(kind, [(name, files[name]) for name in names], class_names, source)
            for split, names in present.items()
            if names
        }
    raise DataError(
        f"data: '{source}' holds none of the files of CIFAR-10 or CIFAR-100 in the binary version, such as"
        " data_batch_1.bin; the Python and Matlab versions are not read. Download cifar-10-binary.tar.gz."
    )


def _decode(kind: Kind, parts: list[tuple[str, bytes]], names: tuple[str, ...], source: Path) -> ArrayCollection:
    record = kind.label_bytes + IMAGE_BYTES
    for name, data in parts:
        if not data or len(data) % record:
            raise DataError(
                f"data: {name} of '{source}' has {len(data)} bytes; it must be a multiple of {record}, one label and"
                " one image after the other. Download it again."
            )
    rows = np.concatenate([np.frombuffer(data, np.uint8).reshape(-1, record) for _, data in parts])
    planes = rows[:, kind.label_bytes :].reshape(-1, CHANNELS, ROWS, COLUMNS)
    labels = rows[:, kind.label_bytes - 1].astype(np.int64)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return ArrayCollection(images=images, labels=labels, class_names=names, source=f"{kind.title}, {source.name}")


def _class_names(kind: Kind, text: bytes | None, source: Path) -> tuple[str, ...]:
    if text is None:
        return tuple(map(str, range(kind.num_classes)))
    names = tuple(filter(None, (line.strip() for line in text.decode("utf-8", "replace").splitlines())))
    if len(names) != kind.num_classes:
        raise DataError(f"data: {kind.names} of '{source}' names {len(names)} classes, not {kind.num_classes}.")
    return names


def _from_folder(source: Path) -> dict[str, bytes]:
    files = {}
    try:
        for path in source.iterdir():
            if path.name in WANTED and path.is_file():
                _check_size(path.name, path.stat().st_size, source)
                with bounded.opened(path) as file:
                    files[path.name] = file.read(LARGEST_FILE_BYTES)
    except OSError as error:
        raise DataError(f"data: cannot read '{source}': {error}.") from None
    return files


def _from_archive(source: Path) -> dict[str, bytes]:
    files = {}
    try:
        with bounded.opened(source) as packed:
            zipped = packed.read(2) == b"\x1f\x8b"
            packed.seek(0)
            stream = _Short(gzip.GzipFile(fileobj=packed) if zipped else packed)  # type: ignore[arg-type]
            # As a stream, which no header can send back to where it was. Sparse members hold less than they claim.
            with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    name = member.name.rsplit("/", 1)[-1]
                    if name in WANTED and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                        _check_size(name, member.size, source)
                        content = archive.extractfile(member)
                        files[name] = content.read() if content is not None else b""
            while stream.read(1 << 20):  # to the end of the compressed stream, where its checksum is
                pass
    except FileNotFoundError:
        raise DataError(f"data: '{source}' does not exist. Fetch it with `hpcnn data fetch cifar10`.") from None
    except DataError:
        raise
    except Exception as error:  # damaged headers make tarfile raise nearly every built-in type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data: '{source}' is damaged or truncated ({reason}). Download it again.") from None
    return files


class _Short:
    """A stream that ends in an error where it goes on for longer than CIFAR: a header may claim to be of any length."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, LARGEST_ARCHIVE_BYTES

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it unpacks to more than {LARGEST_ARCHIVE_BYTES} bytes")
        return data


def _check_size(name: str, size: int, source: Path) -> None:
    if size > LARGEST_FILE_BYTES:
        raise DataError(f"data: {name} of '{source}' claims {size} bytes, more than CIFAR has. Download it again.")
