from __future__ import annotations

import numpy as np
import pytest

from hpcnn.data.augment import Augmentation, normalise

SHAPES = [(1, 1, 1, 1), (5, 4, 7, 3), (3, 9, 2, 1), (130, 6, 6, 3)]


def images_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, shape, np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_and_mirrors_equal_a_slow_loop(shape: tuple[int, int, int, int], pad: int, flip: bool) -> None:
    images, samples = images_of(shape), np.arange(shape[0]) * 7 + 3
    augmentation = Augmentation(4, pad, flip)
    down, right, mirrored = augmentation.draw(samples, 2)
    expected = np.zeros_like(images)
    _, H, W, _ = shape
    for n in range(shape[0]):
        for h in range(H):
            for w in range(W):
                i, j = h + down[n] - pad, (W - 1 - w if mirrored[n] else w) + right[n] - pad
                if 0 <= i < H and 0 <= j < W:
                    expected[n, h, w] = images[n, i, j]
    before = images.copy()
    np.testing.assert_array_equal(expected, augmentation.apply(images, samples, 2))
    np.testing.assert_array_equal(before, images)


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
    assert Augmentation(1).apply(images, np.arange(3), 0) is images


@pytest.mark.parametrize("shape", [*SHAPES, (3, 300, 301, 3), (0, 4, 4, 3)])
def test_normalised_pixels_are_the_formula_in_float64(shape: tuple[int, ...]) -> None:
    images = images_of(shape)
    mean, std = np.linspace(0.3, 0.5, shape[3]), np.linspace(0.2, 0.3, shape[3])
    actual = normalise(images, mean.astype(np.float32), std.astype(np.float32))
    assert actual.dtype == np.float32
    assert actual.shape == shape
    np.testing.assert_allclose((images / 255 - mean) / std, actual, rtol=0, atol=2e-6)
