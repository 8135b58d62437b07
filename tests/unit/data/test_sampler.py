from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcnn.data.sampler import WINDOW_BLOCKS, epoch_order, steps_per_epoch
from hpcnn.errors import DataError


@given(st.integers(1, 3000), st.integers(0, 9), st.integers(0, 5), st.integers(1, 4000))
@settings(deadline=None, max_examples=60)
def test_every_sample_comes_once_an_epoch(count: int, seed: int, epoch: int, block: int) -> None:
    order = epoch_order(count, seed, epoch, block)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.arange(count), np.sort(order))
    np.testing.assert_array_equal(order, epoch_order(count, seed, epoch, block))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {epoch_order(500, seed, epoch, 4).tobytes() for seed in range(3) for epoch in range(5)}
    assert len(orders) == 15
    for epoch in range(5):
        # Nor does an epoch start where another did: about 500 / 4 of the places are equal by chance in none.
        assert (epoch_order(500, 0, epoch, 4) == epoch_order(500, 1, epoch, 4)).mean() < 0.03


def test_the_order_stays_what_it_was_when_runs_were_saved() -> None:
    assert [3, 8, 5, 2, 6, 9, 7, 4, 1, 0] == epoch_order(10, 1, 0, 2).tolist()


def test_a_window_holds_whole_blocks() -> None:
    block, count = 3, 3 * WINDOW_BLOCKS * 5
    order = epoch_order(count, 1, 0, block)
    for window in order.reshape(5, -1):
        blocks, sizes = np.unique(window // block, return_counts=True)
        assert len(blocks) == WINDOW_BLOCKS
        assert (sizes == block).all()
    first = order[: 3 * WINDOW_BLOCKS]
    assert (np.diff(first) == 1).mean() < 0.1  # samples inside a window are mixed
    assert first.max() - first.min() > count / 2  # and blocks come from all over the file


def test_all_positions_are_equally_likely() -> None:
    places = np.array([np.flatnonzero(epoch_order(6, 0, epoch, 2) == 0)[0] for epoch in range(3000)])
    counts = np.bincount(places, minlength=6)
    assert (abs(counts - 500) < 100).all()


def test_a_huge_block_takes_no_memory() -> None:
    assert len(epoch_order(10, 1, 0, 1 << 60)) == 10


def test_the_rest_of_an_epoch_is_dropped_but_never_all_of_it() -> None:
    assert steps_per_epoch(100, 32) == 3
    assert steps_per_epoch(100, 100) == 1
    with pytest.raises(DataError, match=r"global_batch .=101. is larger than the training set .=100 images"):
        steps_per_epoch(100, 101)
