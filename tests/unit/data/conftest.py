from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpcnn.data import hdf5

MakeFile = Callable[..., Path]


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    """Return a function that writes an image file as an import does."""

    def make(count: int = 20, shape: tuple[int, int, int] = (4, 5, 3), classes: int = 3, name: str = "a.h5") -> Path:
        path = tmp_path / name
        images = np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)
        names = tuple(f"kind {index}" for index in range(classes))
        offset = hdf5.create(path, count, shape, names, np.arange(count) % classes, source="tests", licence="none")
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(images.tobytes())
        hdf5.finish(path, np.full(shape[2], 0.4), np.full(shape[2], 0.3))
        return path

    return make


def rows_of(count: int = 20, shape: tuple[int, int, int] = (4, 5, 3)) -> np.ndarray:
    """Return the images that `make_file` puts into a file of these sizes."""
    return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


@pytest.fixture
def expected_rows() -> Callable[..., np.ndarray]:
    return rows_of
