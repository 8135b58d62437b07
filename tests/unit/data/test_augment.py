from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcnn.data import MemoryDataSet
from hpcnn.data.augment import Augmentation, normalise
from hpcnn.data.dataset import DataSet
from hpcnn.data.hdf5 import Hdf5DataSet
from hpcnn.data.synthetic import SyntheticDataSet
from hpcnn.geometry import Block

SHAPES = [(1, 1, 1, 1), (5, 4, 7, 3), (3, 9, 2, 1), (130, 6, 6, 3)]


def images_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, shape, np.uint8)


def in_memory(images: np.ndarray) -> MemoryDataSet:
    C = images.shape[3]
    return MemoryDataSet(images, np.zeros(len(images), np.int64), ("a",), np.zeros(C), np.ones(C))


def augmented(images: np.ndarray, augmentation: Augmentation, samples: np.ndarray, epoch: int) -> np.ndarray:
    """Return whole images, (n, H, W, C), cropped and mirrored pixel by pixel."""
    down, right, mirrored = augmentation.draw(samples, epoch)
    pad, result = augmentation.crop_padding, np.zeros_like(images)
    n, H, W, _ = images.shape
    for k, h, w in np.ndindex(n, H, W):
        i, j = h + down[k] - pad, (W - 1 - w if mirrored[k] else w) + right[k] - pad
        if 0 <= i < H and 0 <= j < W:
            result[k, h, w] = images[k, i, j]
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_and_mirrors_equal_a_slow_loop(shape: tuple[int, int, int, int], pad: int, flip: bool) -> None:
    data = in_memory(images_of((3 * shape[0], *shape[1:])))
    samples = np.arange(shape[0]) * 2 + 1
    augmentation, before = Augmentation(4, pad, flip), data.images.copy()
    expected = augmented(before[samples], augmentation, samples, 2)
    _, H, W, _ = shape
    np.testing.assert_array_equal(expected, augmentation.read(data, samples, 2, Block(0, H), Block(0, W)))
    np.testing.assert_array_equal(before, data.images)


@pytest.fixture(params=["memory", "contiguous file", "compressed file", "synthetic"])
def data(request: pytest.FixtureRequest, make_file: Callable[..., Path], tmp_path: Path) -> DataSet:
    """Return 20 images of 7 x 5 x 3."""
    if request.param == "memory":
        return in_memory(images_of((20, 7, 5, 3)))
    if request.param == "synthetic":
        return SyntheticDataSet((7, 5, 3), 4, 20, "train")
    if request.param == "contiguous file":
        return Hdf5DataSet(make_file(shape=(7, 5, 3)))
    with h5py.File(tmp_path / "z.h5", "w") as file:
        file.create_dataset("images", data=images_of((20, 7, 5, 3)), chunks=(3, 7, 5, 3), compression="gzip")
        file["labels"] = np.zeros(20, np.uint8)
    return Hdf5DataSet(tmp_path / "z.h5")


@pytest.mark.parametrize("pad", [0, 1, 3, 9])
@pytest.mark.parametrize("flip", [False, True])
def test_a_tile_is_cut_out_of_the_augmented_image_bit_by_bit(data: DataSet, pad: int, flip: bool) -> None:
    random, augmentation = np.random.default_rng(pad), Augmentation(4, pad, flip)
    samples = random.permutation(20)[:11]
    with data:
        whole = augmented(data.read(samples)[0], augmentation, samples, 5)
        tiles = [Block(0, 7), Block(0, 0), Block(6, 7), Block(7, 7)], [Block(0, 5), Block(2, 2), Block(0, 1)]
        for _ in range(25):
            for choices, extent in zip(tiles, (7, 5), strict=True):
                choices.append(Block(*map(int, np.sort(random.integers(0, extent + 1, 2)))))
        for rows in tiles[0]:
            for columns in tiles[1]:
                tile = augmentation.read(data, samples, 5, rows, columns)
                expected = whole[:, rows.start : rows.stop, columns.start : columns.stop]
                assert tile.dtype == np.uint8
                np.testing.assert_array_equal(expected, tile)
        nothing = augmentation.read(data, samples[:0], 5, Block(1, 3), Block(0, 2))
        assert nothing.shape == (0, 2, 2, 3)


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    samples = np.arange(1000)
    whole = Augmentation(1, 4, True).draw(samples, 3)
    for part in (slice(0, 1), slice(400, 431)):
        for all_of, some in zip(whole, Augmentation(1, 4, True).draw(samples[part], 3), strict=True):
            np.testing.assert_array_equal(all_of[part], some)
    for other in (Augmentation(2, 4, True).draw(samples, 3), Augmentation(1, 4, True).draw(samples, 4)):
        assert all((one == two).mean() < 0.6 for one, two in zip(whole, other, strict=True))


def test_all_crops_are_equally_likely_and_independent_of_the_mirror() -> None:
    down, right, mirrored = Augmentation(1, 2, True).draw(np.arange(20_000), 0)
    counts = np.bincount(down * 10 + right * 2 + mirrored, minlength=50)
    assert counts.shape == (50,)
    assert (abs(counts - 400) < 100).all()


def test_without_augmentation_images_pass_untouched() -> None:
    images = images_of((3, 4, 4, 3))
    tile = Augmentation(1).read(in_memory(images), np.arange(3), 0, Block(0, 4), Block(0, 4))
    np.testing.assert_array_equal(images, tile)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 300, 301, 3), (0, 4, 4, 3)])
def test_normalised_pixels_are_the_formula_in_float64(shape: tuple[int, ...]) -> None:
    images = images_of(shape)
    mean, std = np.linspace(0.3, 0.5, shape[3]), np.linspace(0.2, 0.3, shape[3])
    actual = normalise(images, mean.astype(np.float32), std.astype(np.float32))
    assert actual.dtype == np.float32
    assert actual.shape == shape
    np.testing.assert_allclose((images / 255 - mean) / std, actual, rtol=0, atol=2e-6)
