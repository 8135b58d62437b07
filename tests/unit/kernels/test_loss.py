"""The kernel of the loss against the loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.errors import ShapeError
from hpcnn.ops import cpu
from hpcnn.ops.cuda import loss
from tests import reference
from tests.checks import assert_close
from tests.mixed import BFLOAT16, DTYPES, TOLERANCES

SHAPES = [(5, 10), (1, 1), (3, 33), (4, 1000), (300, 7)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_hits_and_gradient_equal_the_loops(device, random, shape, smoothing, dtype):
    logits = (5 * random.standard_normal(shape)).astype(dtype)
    labels = random.integers(shape[1], size=shape[0])
    options = {"global_batch": 2 * shape[0], "label_smoothing": smoothing}
    value, hits, grad = loss.softmax_cross_entropy(device.upload(logits), labels, **options)
    expected = reference.softmax_cross_entropy(logits, labels, **options)
    assert isinstance(value, float)
    assert value == pytest.approx(expected[0], rel=1e-12, abs=1e-14)
    assert hits == expected[1]
    assert grad.dtype == dtype
    assert_close(expected[2], device.download(grad), TOLERANCES[dtype])


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_labels_may_be_on_the_device(device, random, kind):
    logits, labels = random.standard_normal((6, 4)).astype(np.float32), np.array([0, 1, 2, 3, 0, 3], kind)
    value, hits, _ = loss.softmax_cross_entropy(device.upload(logits), device.upload(labels), global_batch=6)
    expected = reference.softmax_cross_entropy(logits, labels, 6)
    assert value == pytest.approx(expected[0], rel=1e-12)
    assert hits == expected[1]


def test_the_first_of_equal_logits_counts(device):
    logits = np.zeros((4, 300), np.float32)
    logits[2:, 299] = logits[2:, 40] = 2.0
    _, hits, _ = loss.softmax_cross_entropy(device.upload(logits), np.array([0, 1, 40, 299]), global_batch=4)
    assert hits == 2


def test_large_logits_overflow_nothing(device):
    logits = np.array([[1e4, 0.0, -1e4], [-3e38, 3e38, 0.0]], np.float32)
    value, hits, grad = loss.softmax_cross_entropy(device.upload(logits), np.array([0, 1]), global_batch=2)
    assert (value, hits) == (0.0, 2)
    np.testing.assert_array_equal(np.zeros((2, 3)), device.download(grad))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_shows_in_loss_and_gradient(device, random, bad):
    logits = random.standard_normal((3, 50)).astype(np.float32)
    logits[1, 7] = bad
    value, hits, grad = loss.softmax_cross_entropy(device.upload(logits), np.array([0, 7, 2]), global_batch=3)
    with np.errstate(invalid="ignore"):
        expected = cpu.softmax_cross_entropy(logits, np.array([0, 7, 2]), global_batch=3)
    assert math.isnan(value)
    assert hits == expected[1]
    np.testing.assert_array_equal(np.isnan(expected[2]), np.isnan(device.download(grad)))


def test_the_public_function_comes_here_and_checks_labels(on_device, random):
    logits = random.standard_normal((3, 5)).astype(BFLOAT16)
    value, _, grad = ops.softmax_cross_entropy(on_device.upload(logits), np.array([4, 0, 2]), global_batch=3)
    assert value == pytest.approx(reference.softmax_cross_entropy(logits, [4, 0, 2], 3)[0])
    assert grad.dtype == BFLOAT16
    with pytest.raises(ShapeError, match="labels run from 0 to 5"):
        ops.softmax_cross_entropy(on_device.upload(logits), np.array([5, 0, 2]), global_batch=3)
