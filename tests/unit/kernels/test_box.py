"""Boxes are packed and unpacked as NumPy's slices are, of elements of any size."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from hpcnn.errors import ShapeError
from hpcnn.ops.cuda import box as boxes
from tests.mixed import BFLOAT16, DTYPES, draw, unaligned

# Shapes with boxes: all, rows, columns, channels, corners, a sample; of fewer axes; a long line.
CASES = [
    ((2, 5, 6, 8), ((0, 2), (0, 5), (0, 6), (0, 8))),
    ((2, 5, 6, 8), ((0, 2), (1, 3), (0, 6), (0, 8))),
    ((3, 5, 6, 3), ((0, 3), (0, 5), (4, 6), (0, 3))),
    ((2, 5, 6, 16), ((0, 2), (0, 5), (0, 6), (8, 16))),
    ((2, 5, 7, 5), ((1, 2), (4, 5), (3, 7), (1, 4))),
    ((3, 4), ((1, 3), (0, 4))),
    ((4, 6, 5), ((0, 4), (2, 3), (1, 5))),
    ((9,), ((2, 7),)),
    ((1, 1, 70001), ((0, 1), (0, 1), (1, 70001))),
]
TYPES = [np.dtype(np.uint8), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]


def numbers(shape, dtype):
    return (np.arange(prod(shape)) % 251).reshape(shape).astype(dtype)


def cut(box):
    return tuple(slice(*part) for part in box)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "box"), CASES)
@pytest.mark.parametrize("put", [lambda device, x: device.upload(x), unaligned])
def test_a_box_there_and_back(device, shape, box, put, dtype):
    x = numbers(shape, dtype)
    piece = boxes.pack(put(device, x), box)
    np.testing.assert_array_equal(x[cut(box)], device.download(piece))
    target, expected = put(device, np.zeros_like(x)), np.zeros_like(x)
    boxes.unpack(target, cut(box), piece)
    expected[cut(box)] = x[cut(box)]
    np.testing.assert_array_equal(expected, device.download(target))


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize(("shape", "box"), CASES)
def test_a_piece_is_added(device, random, shape, box, dtype):
    x, y = draw(random, shape, dtype), draw(random, shape, dtype)
    target = device.upload(y)
    boxes.unpack(target, box, boxes.pack(device.upload(x), box), add=True)
    y[cut(box)] += x[cut(box)]
    np.testing.assert_array_equal(y, device.download(target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_boxes_lie_one_after_the_other(device, random, dtype):
    x = draw(random, (3, 9, 8, 4), dtype)
    rows = [((0, 3), (0, 1), (0, 8), (0, 4)), ((0, 3), (8, 9), (0, 8), (0, 4))]
    many = [((n, n + 1), (r, r + 2), (c, c + 3), (0, 4)) for n in range(3) for r in range(0, 8, 2) for c in (0, 4)]
    chosen = [*rows, ((0, 0), (0, 1), (0, 8), (0, 4)), *many]
    flat = device.empty((sum(x[cut(box)].size for box in chosen),), dtype)
    boxes.pack_all(device.upload(x), chosen, flat)
    np.testing.assert_array_equal(np.concatenate([x[cut(box)].ravel() for box in chosen]), device.download(flat))

    written, added, expected = device.upload(np.zeros_like(x)), device.upload(x), x.copy()
    boxes.unpack_all(written, many, flat[-sum(x[cut(box)].size for box in many) :])
    kept = np.zeros(x.shape, bool)
    for box in many:
        kept[cut(box)] = True
    np.testing.assert_array_equal(np.where(kept, x, 0), device.download(written))
    boxes.unpack_all(added, chosen, flat, add=True)  # these overlap, and follow their order
    for box in chosen:
        expected[cut(box)] += x[cut(box)]
    np.testing.assert_array_equal(expected, device.download(added))


def test_boxes_that_do_not_fit_are_refused(device):
    x = device.empty((2, 3, 4), np.float32)
    with pytest.raises(ShapeError, match="2 ranges for an array of 3 axes"):
        boxes.pack(x, ((0, 1), (0, 1)))
    with pytest.raises(ShapeError, match="must lie inside"):
        boxes.pack(x, ((0, 1), (0, 1), (2, 5)))
    with pytest.raises(ShapeError, match=r"piece has shape \(1, 1\)"):
        boxes.unpack(x, ((0, 1), (0, 1), (2, 4)), device.empty((1, 1), np.float32))
    with pytest.raises(ShapeError, match=r"it must be float32 of \(2,\)"):
        boxes.pack_all(x, [((0, 1), (0, 1), (2, 4))], device.empty((3,), np.float32))
