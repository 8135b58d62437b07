"""Well-known data sets: where they are published, what their bytes must be, and how they become HDF5 files."""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hpcnn.data.importers import Alone, Progress, Written, cifar, idx, write_splits
from hpcnn.data.importers.collection import Collection
from hpcnn.errors import DataError

TIMEOUT_S = 60.0
PIECE_BYTES = 1 << 18


class File(NamedTuple):
    """A published file.

    The checksum, "algorithm:hexadecimal", and the length in bytes are those of the contents of a `.gz` file, so that a
    copy which somebody compressed anew is as good; and those of the file itself otherwise.
    """

    name: str
    num_bytes: int
    checksum: str


class Published(NamedTuple):
    """A data set as its makers publish it."""

    title: str
    url: str
    licence: str
    files: tuple[File, ...]
    class_names: tuple[str, ...] = ()


def _idx_files(*checksums: str) -> tuple[File, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    lengths = (16 + 60_000 * 784, 8 + 60_000, 16 + 10_000 * 784, 8 + 10_000)
    return tuple(
        File(f"{name}-ubyte.gz", length, f"sha256:{checksum}")
        for name, length, checksum in zip(names, lengths, checksums, strict=True)
    )


CATALOGUE: dict[str, Published] = {
    "fashion-mnist": Published(
        "Fashion-MNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "MIT, Copyright (c) 2017 Zalando SE",
        _idx_files(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "mnist": Published(
        "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "CC BY-SA 3.0",
        _idx_files(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "cifar10": Published(
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/",
        "",
        (File("cifar-10-binary.tar.gz", 170_052_171, "md5:c32a1d4ab5d03f1284b67883e8d87530"),),
    ),
}


def fetch(
    name: str,
    out: Path,
    *,
    mirror: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> list[Written]:
    """Download a published data set, check every byte, and make train.h5 and test.h5 in `out`.

    Parameters
    ----------
    name : str
        A key of `CATALOGUE`.
    mirror : str, optional
        URL, file:// included, of a folder that holds the same files.
    say : callable, optional
        Is given a line for every file.
    progress : callable, optional
        See `importers.import_data`.

    Raises
    ------
    DataError
        If a file cannot be had or is not what was published. Nothing is left behind then.
    """
    published = CATALOGUE[name]
    base = (mirror or published.url).rstrip("/") + "/"
    with tempfile.TemporaryDirectory(prefix="hpcnn-fetch-") as folder:
        for file in published.files:
            say(f"{base}{file.name}")
            download(base + file.name, Path(folder) / file.name, file)
        return write_splits(_load(published, Path(folder)), out, Alone(), progress=progress)


def download(url: str, path: Path, file: File) -> None:
    """Copy what lies at `url` to `path` and check it against `file`; raises DataError, and leaves no half file."""
    advice = "Check the network, or name a copy with --mirror URL or --from FOLDER."
    # Compression adds a fraction of a thousandth at worst: a server that goes on sending is not listened to.
    most = file.num_bytes + file.num_bytes // 100 + 1024
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, open(path, "wb") as target:
            total = 0
            while piece := answer.read(PIECE_BYTES):
                total += len(piece)
                if total > most:
                    raise DataError(f"data: '{url}' sends more than {most} bytes; {file.name} has fewer. {advice}")
                target.write(piece)
            promised = answer.headers.get("Content-Length", "")
        if promised.isdecimal() and int(promised) != total:
            raise DataError(f"data: '{url}' broke off after {total} of {promised} bytes. {advice}")
        check(path, file)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError | HTTPException | ValueError) and not isinstance(error, DataError):
            raise DataError(f"data: cannot download '{url}' ({error}). {advice}") from None
        raise


def check(path: Path, file: File) -> None:
    """Raise DataError unless the file at `path` has the published bytes."""
    algorithm, _, expected = file.checksum.partition(":")
    digest, total = hashlib.new(algorithm, usedforsecurity=False), 0
    zipped = file.name.endswith(".gz") and not file.name.endswith(".tar.gz")
    reason = ""
    try:
        with gzip.open(path) if zipped else open(path, "rb") as stream:
            while (piece := _read(stream)) and total <= file.num_bytes:  # no further: it could expand without end
                digest.update(piece)
                total += len(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"it is truncated or damaged: {error}"
    if not reason and digest.hexdigest() != expected:
        reason = f"its {algorithm} is {digest.hexdigest()} (over {total} bytes), the published one {expected}"
    if reason:
        raise DataError(f"data: {file.name} is not the published file: {reason}. Download it again from another place.")


def _read(stream: BinaryIO | gzip.GzipFile) -> bytes:
    return stream.read(PIECE_BYTES)


def _load(published: Published, folder: Path) -> dict[str, Collection]:
    if published.title.startswith("CIFAR"):
        return dict(cifar.load(folder / published.files[0].name))
    splits: dict[str, Collection] = {}
    for number, split in enumerate(("train", "test")):
        images, labels = (folder / file.name for file in published.files[2 * number : 2 * number + 2])
        splits[split] = idx.load(
            images, labels, published.class_names, source=f"{published.title}, {split}", licence=published.licence
        )
    return splits
