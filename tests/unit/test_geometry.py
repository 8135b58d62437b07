"""Blocks of an index range and sizes of sliding windows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcnn import geometry
from hpcnn.errors import ShapeError
from tests import reference


@given(st.integers(0, 1000), st.integers(1, 50))
def test_blocks_cover_the_range_in_order_and_differ_by_one_at_most(count, parts):
    blocks = geometry.blocks(count, parts)
    assert list(range(count)) == [index for block in blocks for index in range(block.start, block.stop)]
    sizes = [block.size for block in blocks]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(sizes, reverse=True) == sizes


def test_the_first_blocks_get_the_items_left_over():
    assert [(0, 3), (3, 6), (6, 8), (8, 10)] == [tuple(block) for block in geometry.blocks(10, 4)]
    assert geometry.split(10, 4, 2) == geometry.Block(6, 8)


def test_more_parts_than_items_leave_empty_blocks():
    assert [1, 1, 0, 0] == [block.size for block in geometry.blocks(2, 4)]


def test_pair_takes_one_number_or_two():
    assert geometry.pair(3) == (3, 3)
    assert geometry.pair((2, 5)) == (2, 5)
    assert geometry.pair([2, 5]) == (2, 5)


def test_four_sided_takes_one_number_a_pair_or_itself():
    assert geometry.four_sided(1) == ((1, 1), (1, 1))
    assert geometry.four_sided((1, 2)) == ((1, 1), (2, 2))
    assert geometry.four_sided(((1, 2), (3, 4))) == ((1, 2), (3, 4))
    assert geometry.four_sided([[1, 2], [3, 4]]) == ((1, 2), (3, 4))


few = st.integers(1, 4)
pairs = st.tuples(few, few)
sides = st.tuples(st.integers(0, 5), st.integers(0, 5))


@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), pairs, pairs, st.tuples(sides, sides), pairs)
def test_output_size_counts_the_windows_that_fit(input_size, kernel_size, stride, padding, dilation):
    expected = reference.output_size(input_size, kernel_size, stride, padding, dilation)
    if 0 in expected:
        with pytest.raises(ShapeError, match="smaller than the window"):
            geometry.output_size(input_size, kernel_size, stride, padding, dilation)
    else:
        assert expected == geometry.output_size(input_size, kernel_size, stride, padding, dilation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((5, 5), (0, 1)), r"kernel \(=0\), stride \(=1\) and dilation \(=1\) along H must be at least 1"),
        (((5, 5), (1, 1), (1, 0)), r"stride \(=0\) and dilation \(=1\) along W"),
        (((5, 5), (1, 1), (1, 1), ((0, 0), (0, -1))), r"padding \(=0, -1\) at least 0"),
        (((5, 5), (1, 1), (1, 1), ((0, 0), (0, 0)), (0, 1)), r"dilation \(=0\) along H"),
        (((5, 4), (3, 5)), r"W \(=4\) with padding \(=0, 0\) is smaller than the window \(=5\)"),
        (((5, 4), (3, 3), (1, 1), ((0, 0), (0, 0)), (3, 1)), r"H \(=5\) .* smaller than the window \(=7\)"),
    ],
)
def test_windows_that_cannot_be_are_refused_with_their_numbers(arguments, message):
    with pytest.raises(ShapeError, match=message):
        geometry.output_size(*arguments)
