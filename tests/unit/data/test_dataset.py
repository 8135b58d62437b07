from __future__ import annotations

import numpy as np
import pytest

from hpcnn.data import MemoryDataSet
from hpcnn.errors import DataError


def test_a_set_in_memory_reads_what_it_was_given() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1)
    with MemoryDataSet(images, np.arange(6) % 2, ("a", "b"), np.zeros(1), np.ones(1)) as data:
        assert (len(data), data.image_shape, data.num_classes) == (6, (2, 2, 1), 2)
        read, labels = data.read(np.array([5, 0]))
    np.testing.assert_array_equal(images[[5, 0]], read)
    np.testing.assert_array_equal([1, 0], labels)


@pytest.mark.parametrize(("labels", "words"), [([0, 1], "one an image"), ([0, 2, 1], "image 1 .=2. is out of range")])
def test_labels_that_do_not_fit_are_refused(labels: list[int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        MemoryDataSet(np.zeros((3, 2, 2, 1), np.uint8), np.array(labels), ("a", "b"), np.zeros(1), np.ones(1))
