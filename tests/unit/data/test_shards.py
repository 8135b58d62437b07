from __future__ import annotations

import numpy as np
import pytest

from hpcnn.data import MemoryDataSet
from hpcnn.data.dataset import Subset, Windows
from hpcnn.data.shards import held_out, shards
from hpcnn.errors import DataError


def test_held_out_rows_are_drawn_by_the_seed_and_are_not_trained_with():
    rows, validation = held_out(100, 30, seed=4)
    assert len(validation) == 30
    assert sorted([*rows, *validation]) == list(range(100))
    assert (np.diff(rows) > 0).all()
    assert (np.diff(validation) > 0).all()
    np.testing.assert_array_equal(validation, held_out(100, 30, seed=4)[1])
    assert not np.array_equal(validation, held_out(100, 30, seed=5)[1])
    assert len(set(np.diff(validation))) > 1, "cut out of the file rather than drawn"


def test_holding_out_everything_is_refused():
    with pytest.raises(DataError, match=r"validation_samples \(=100\) must be fewer than the training images \(=100\)"):
        held_out(100, 100, seed=1)


@pytest.mark.parametrize("fractions", [(1.0,), (0.5, 0.5), (0.55, 0.25, 0.15, 0.05), (1 / 3, 1 / 3, 1 / 3)])
def test_shards_have_their_fractions_and_together_all_rows(fractions):
    rows = np.arange(3, 1003)
    found = shards(rows, fractions, seed=2)
    assert sorted(np.concatenate(found)) == list(rows)
    for part, fraction in zip(found, fractions, strict=True):
        assert abs(len(part) - 1000 * fraction) <= 1
        assert (np.diff(part) > 0).all()
    if len(fractions) > 1:
        assert found[0][-1] > found[1][0], "cut out of the file rather than drawn"


def test_a_subset_reads_its_rows_of_the_set():
    draw = np.random.default_rng(1)
    images, labels = draw.integers(0, 256, (9, 4, 4, 1), np.uint8), np.arange(9) % 3
    data = MemoryDataSet(images, labels, tuple("abc"), np.zeros(1), np.ones(1))
    subset = Subset(data, np.array([7, 2, 5]))
    assert len(subset) == 3
    found, classes = subset.read(np.array([2, 0]))
    np.testing.assert_array_equal(found, images[[5, 7]])
    np.testing.assert_array_equal(classes, labels[[5, 7]])
    np.testing.assert_array_equal(subset.labels_of(np.array([1])), labels[[2]])
    window = Windows(np.array([1]), np.array([2]), (2, 2))
    np.testing.assert_array_equal(subset.read(np.array([1]), window)[0], images[2:3, 1:3, 2:4])
    assert subset.fingerprint() not in (data.fingerprint(), Subset(data, np.array([7, 2, 6])).fingerprint())
