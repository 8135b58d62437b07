from __future__ import annotations

import numpy as np

from hpcnn.data.synthetic import KEPT_BYTES, SyntheticDataSet


def test_an_image_depends_on_its_index_alone() -> None:
    one, other = (SyntheticDataSet((9, 7, 3), 5, 100, "train") for _ in range(2))
    together, labels = one.read(np.arange(100))
    for index in (99, 3, 50):
        image, label = other.read(np.array([index]))
        np.testing.assert_array_equal(together[index], image[0])
        assert labels[index] == label[0]
    assert one.fingerprint() == other.fingerprint()


def test_test_images_differ_from_training_images_of_the_same_classes() -> None:
    train, test = (SyntheticDataSet((8, 8, 1), 3, 50, split).read(np.arange(50)) for split in ("train", "test"))
    assert not np.array_equal(train[0], test[0])
    assert not np.array_equal(train[1], test[1])


def test_classes_can_be_told_apart_by_their_mean_images() -> None:
    data, new = (SyntheticDataSet((16, 16, 3), 10, 600, split) for split in ("train", "test"))
    images, labels = data.read(np.arange(600))
    means = np.stack([images[labels == label].mean(0) for label in range(10)])
    images, labels = new.read(np.arange(200))
    distances = ((images[:, None].astype(float) - means) ** 2).sum((2, 3, 4))
    assert (distances.argmin(1) == labels).mean() > 0.99


def test_mean_and_deviation_are_those_of_the_pixels() -> None:
    data = SyntheticDataSet((32, 32, 3), 200, 400, "train")
    images, _ = data.read(np.arange(400))
    np.testing.assert_allclose(images.mean((0, 1, 2)) / 255, data.mean, atol=0.01)
    np.testing.assert_allclose(images.std((0, 1, 2)) / 255, data.std, atol=0.01)


def test_a_thousand_classes_of_large_images_keep_little_in_memory() -> None:
    data = SyntheticDataSet((608, 608, 3), 1000, 1_000_000, "train")
    images, labels = data.read(np.arange(70))
    assert images.shape == (70, 608, 608, 3)
    assert len(set(labels.tolist())) > 60
    assert sum(pattern.nbytes for pattern in data._patterns.values()) <= KEPT_BYTES


def test_images_smaller_than_the_pattern_work() -> None:
    images, _ = SyntheticDataSet((1, 3, 1), 2, 4, "train").read(np.arange(4))
    assert images.shape == (4, 1, 3, 1)
