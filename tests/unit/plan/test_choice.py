"""The fixed rule for algorithms that nobody chose."""

from __future__ import annotations

import pytest

from hpcnn.plan.choice import allreduce_algorithm, block_algorithm


@pytest.mark.parametrize(
    ("num_bytes", "size", "expected"),
    [
        (4, 2, "butterfly"),
        (4, 7, "butterfly"),
        (4, 8192, "butterfly"),
        (200_000, 2, "butterfly"),
        (200_000, 4, "halving-doubling"),
        (4_000_000, 2, "halving-doubling"),
        (4_000_000, 3, "ring"),
        (4_000_000, 6, "ring"),
        (4_000_000, 8, "halving-doubling"),
        (4_000_000, 100, "halving-doubling"),
    ],
)
def test_allreduce_takes_few_messages_when_small_and_few_bytes_when_large(num_bytes, size, expected):
    assert expected == allreduce_algorithm(num_bytes, size)


@pytest.mark.parametrize(
    ("num_bytes", "size", "expected"),
    [(4, 3, "butterfly"), (4_000_000, 4, "butterfly"), (4_000_000, 3, "ring"), (4_000_000, 12, "butterfly")],
)
def test_blocks_take_the_ring_only_on_few_ranks_that_are_no_power_of_two(num_bytes, size, expected):
    assert expected == block_algorithm(num_bytes, size)
