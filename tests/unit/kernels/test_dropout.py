"""Kernels of dropout have the masks of the NumPy operators, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops, rng
from hpcnn.ops import cpu
from hpcnn.ops.cuda import dropout
from tests.mixed import BFLOAT16, DTYPES, draw

STREAM = rng.key(1, "dropout", 3, 5)
# Samples, elements of each: multiples of vectors, not, and more than the grid holds at once.
SHAPES = [(3, 16), (5, 2, 3, 7), (2, 1, 1), (70, 1000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_masks_and_numbers_are_those_of_numpy(device, random, shape, rate, dtype):
    x, grad = draw(random, shape, dtype), draw(random, shape, dtype)
    samples = random.integers(2**31, size=shape[0])
    elements = np.arange(x[0].size)
    y, mask = dropout.dropout_forward(device.upload(x), rate, STREAM, samples, elements)
    expected, keep = cpu.dropout_forward(x.astype(np.float32), rate, STREAM, samples, elements)
    assert y.dtype == dtype
    assert mask.dtype == bool
    np.testing.assert_array_equal(keep, device.download(mask))
    np.testing.assert_array_equal(expected.astype(dtype), device.download(y))
    grad_x = dropout.dropout_backward(device.upload(grad), mask, rate)
    expected = cpu.dropout_backward(grad.astype(np.float32), keep, rate)
    np.testing.assert_array_equal(expected.astype(dtype), device.download(grad_x))


@pytest.mark.parametrize(
    "elements", [np.arange(7, 47), np.arange(40)[::-1].copy(), 3 * np.arange(40), np.array([2**32 - 1] * 40)]
)
@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_parts_of_the_elements_get_their_own_draws(device, random, elements, kind):
    x, samples = draw(random, (3, 40)), np.array([5, 0, 2**32 - 1])
    _, mask = dropout.dropout_forward(device.upload(x), 0.5, STREAM, samples, elements.astype(kind))
    _, keep = cpu.dropout_forward(x, 0.5, STREAM, samples, elements)
    np.testing.assert_array_equal(keep, device.download(mask))


def test_a_draw_that_equals_the_rate_is_kept(device, random):
    x, samples, elements = draw(random, (1, 32)), np.arange(1), np.arange(32)
    rate = float(rng.uniform(STREAM, np.arange(32, dtype=np.uint64))[9])
    mask = device.download(dropout.dropout_forward(device.upload(x), rate, STREAM, samples, elements)[1])
    assert mask[0, 9]
    assert not mask.all()


def test_the_largest_stream_does_not_overflow(device, random):
    x, samples, elements = draw(random, (2, 64)), np.arange(2), np.arange(64)
    _, mask = dropout.dropout_forward(device.upload(x), 0.5, 2**64 - 1, samples, elements)
    np.testing.assert_array_equal(cpu.dropout_forward(x, 0.5, 2**64 - 1, samples, elements)[1], device.download(mask))


def test_a_dropped_number_that_is_none_stays_so(device):
    x = np.full((1, 64), np.nan, np.float32)
    y, mask = dropout.dropout_forward(device.upload(x), 0.5, STREAM, np.arange(1), np.arange(64))
    assert not device.download(mask).all()
    assert np.isnan(device.download(y)).all()


def test_the_public_functions_come_here(on_device, random):
    x = draw(random, (6, 20), BFLOAT16)
    y, mask = ops.dropout_forward(on_device.upload(x), 0.5, STREAM, np.arange(6))
    grad = ops.dropout_backward(y, mask, 0.5)
    np.testing.assert_array_equal(4 * x.astype(np.float32) * on_device.download(mask), on_device.download(grad))


def test_a_mask_may_be_a_view_with_gaps(on_device, random):
    x = draw(random, (6, 20))
    _, mask = ops.dropout_forward(on_device.upload(x), 0.5, STREAM, np.arange(6))
    grad = ops.dropout_backward(on_device.upload(x[:, 3:9]), mask[:, 3:9], 0.5)
    np.testing.assert_array_equal((2 * x * on_device.download(mask))[:, 3:9], on_device.download(grad))
