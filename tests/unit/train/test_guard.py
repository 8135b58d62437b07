import pytest

from hpcnn.train.guard import odd_ranks


@pytest.mark.parametrize(
    ("checksums", "parts", "odd"),
    [
        ([7, 7, 7, 7], 1, []),
        ([7, 7, 9, 7], 1, [2]),
        ([9, 7, 7], 1, [0]),
        ([7, 9, 8, 7, 7], 1, [1, 2]),
        ([7, 9], 1, [0, 1]),
        ([7, 7, 9, 9], 1, [0, 1, 2, 3]),
        ([1, 2, 3, 4], 4, []),
        ([1, 2, 1, 2, 1, 3], 2, [5]),
        ([1, 2, 1, 2, 5, 2], 2, [4]),
        ([1, 2, 3, 1], 3, []),
        ([1], 1, []),
    ],
)
def test_ranks_are_held_against_the_majority_of_those_with_the_same_part(checksums, parts, odd):
    assert odd == odd_ranks(checksums, parts)
