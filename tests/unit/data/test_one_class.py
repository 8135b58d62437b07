"""One class against all others, and rows that are held out."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.data.dataset import MemoryDataSet, Windows
from hpcnn.data.one_class import OneClass, hold_out
from hpcnn.errors import DataError


def data(labels: list[int]) -> MemoryDataSet:
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    return MemoryDataSet(images, np.array(labels), ("cat", "dog", "cow"), np.zeros(1), np.ones(1))


def test_either_kind_is_read_equally_often_and_each_row_at_least_once() -> None:
    labels = [0, 1, 2, 0, 0, 2, 0, 0]
    one = OneClass(data(labels), np.arange(8), 1)
    images, found = one.read(np.arange(len(one)))
    assert (len(one), one.num_classes, one.class_names) == (14, 2, ("another", "dog"))
    assert found.tolist() == [0, 1] * 7
    assert set(images[found == 1].reshape(-1).tolist()) == {1}
    assert sorted(images[found == 0, 0, 0, 0].tolist()) == [0, 2, 3, 4, 5, 6, 7]
    assert np.array_equal(one.labels_of(np.array([3, 2])), [1, 0])


def test_rows_may_stay_as_they_are() -> None:
    one = OneClass(data([0, 1, 2, 0, 0]), np.array([4, 2, 1]), 2, balanced=False)
    images, found = one.read(np.arange(3), Windows(np.zeros(3, int), np.zeros(3, int), (1, 2)))
    assert (images[:, 0, 0, 0].tolist(), images.shape, found.tolist()) == ([4, 2, 1], (3, 1, 2, 1), [0, 1, 0])


def test_fingerprint_names_the_class_and_the_data() -> None:
    rows, labels = np.arange(4), [0, 1, 2, 1]
    prints = [OneClass(data(labels), rows, index).fingerprint() for index in (0, 1, 2)]
    assert len(set(prints)) == 3
    assert prints[0] == OneClass(data(labels), rows, 0).fingerprint()


@pytest.mark.parametrize("labels", [[0, 2, 0], [1, 1, 1]])
def test_a_set_of_one_kind_is_refused(labels: list[int]) -> None:
    with pytest.raises(DataError, match=r"of 3 training images \d are of class 1 \('dog'\)"):
        OneClass(data(labels), np.arange(3), 1)


def test_a_share_of_each_class_is_held_out_the_same_for_a_seed() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 50, 3, 1])
    kept, held = hold_out(labels, 0.1, 5)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(154))
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 5, 1, 0]
    assert np.array_equal(held, hold_out(labels, 0.1, 5)[1])
    assert not np.array_equal(held, hold_out(labels, 0.1, 6)[1])
