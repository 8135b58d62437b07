"""The numbers of the self-test: sums that float32 holds exactly, on however many ranks, and pairs that meet."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.analysis.self_test import _numbers, _pairs


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000, 8192])
def test_sums_are_exact_in_float32_in_any_order(size: int) -> None:
    parts = np.stack([_numbers(2003, rank, size)[0] for rank in range(min(size, 64))])
    expected = _numbers(2003, 0, size)[1]
    assert parts.dtype == expected.dtype == np.float32
    weights = sum(1 + rank % 16 for rank in range(size))
    base = parts[0].astype(np.float64)  # rank 0 has weight 1
    assert np.array_equal(base, np.rint(base))
    assert base.min() >= 1.0
    assert len(np.unique(base)) > 1
    assert np.array_equal(expected.astype(np.float64), base * weights)
    assert expected.max() <= 2**24
    if size <= 64:
        assert np.array_equal(parts.sum(axis=0, dtype=np.float64), expected)


def test_a_pair_takes_as_long_as_the_slower_of_the_two() -> None:
    found = _pairs([[(0, 1, 0.5)], [(0, 1, 0.7), (1, 2, 0.1)], [(1, 2, 0.2)]], (0, 0, 1))
    assert [(pair.ranks, pair.seconds, pair.same_node) for pair in found] == [((0, 1), 0.7, True), ((1, 2), 0.2, False)]
