from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def idx_bytes(array: np.ndarray) -> bytes:
    """Return an array of bytes in IDX format."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def make_idx(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a folder of IDX files: 12 training and 5 test images of 4x3 pixels."""

    def make(zipped: bool = True) -> Path:
        folder = tmp_path / "idx"
        folder.mkdir(exist_ok=True)
        random = np.random.default_rng(0)
        for prefix, count in (("train", 12), ("t10k", 5)):
            images, labels = random.integers(0, 256, (count, 4, 3), np.uint8), np.arange(count, dtype=np.uint8) % 3
            for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
                data, suffix = idx_bytes(array), ".gz" if zipped else ""
                (folder / f"{prefix}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(data) if zipped else data)
        return folder

    return make


def cifar_files(per_file: int = 4) -> dict[str, bytes]:
    """Return files as CIFAR-10's, small: by name."""
    random, files = np.random.default_rng(1), {}
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        rows = random.integers(0, 256, (per_file, 3073), np.uint8)
        rows[:, 0] = np.arange(per_file) % 10
        files[name] = rows.tobytes()
    files["batches.meta.txt"] = "\n".join(f"kind{index}" for index in range(10)).encode() + b"\n\n"
    return files


def tar_bytes(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    """Return an archive of files by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def cifar() -> dict[str, bytes]:
    return cifar_files()


@pytest.fixture
def to_tar() -> Callable[..., bytes]:
    return tar_bytes


@pytest.fixture
def to_idx() -> Callable[[np.ndarray], bytes]:
    return idx_bytes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a tree of PNG files, train and val, three classes, 8x8, plus names for two of the classes."""
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(2)
    for split, count in (("train", 7), ("val", 2)):
        for name in ("n2", "n1", "n3"):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{number:03d}.png")
    (tmp_path / "tree" / "classes.tsv").write_text("n1\tgoldfish\nn2\ttabby, cat\n\nno tab\n")
    return tmp_path / "tree"
