"""Dropout: masks that know only the global sample index, their rate, and the gradient."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops, rng
from hpcnn.errors import ShapeError
from hpcnn.ops.cpu import blocks
from hpcnn.ops.cpu import dropout as numpy_dropout
from tests.checks import assert_adjoint, assert_close

STREAM = rng.key(1, "dropout", 3, 5)


def test_the_mask_is_drawn_from_the_counters_of_sample_and_element(implementation, random):
    x = random.standard_normal((3, 2, 5, 2)).astype(np.float32)
    samples = np.array([7, 2**31 + 1, 0])
    _, mask = ops.dropout_forward(x, 0.4, STREAM, samples)
    for n, sample in enumerate(samples):
        counters = np.array([(int(sample) << 32) | element for element in range(20)], np.uint64)
        np.testing.assert_array_equal(rng.uniform(STREAM, counters) >= np.float32(0.4), mask[n].ravel())


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_parts_of_a_batch_get_the_masks_of_the_whole(implementation, random, cut):
    x, samples = random.standard_normal((7, 4, 9)).astype(np.float32), random.permutation(1000)[:7]
    y, mask = ops.dropout_forward(x, 0.5, STREAM, samples)
    parts = [ops.dropout_forward(x[s], 0.5, STREAM, samples[s]) for s in (slice(cut), slice(cut, None))]
    np.testing.assert_array_equal(y, np.concatenate([part[0] for part in parts]))
    np.testing.assert_array_equal(mask, np.concatenate([part[1] for part in parts]))


def test_parts_of_the_elements_get_the_masks_of_the_whole(implementation, random):
    x, samples = random.standard_normal((5, 30)).astype(np.float32), np.arange(5)
    y, _ = ops.dropout_forward(x, 0.5, STREAM, samples)
    parts = [ops.dropout_forward(x[:, a:b], 0.5, STREAM, samples, np.arange(a, b))[0] for a, b in ((0, 11), (11, 30))]
    np.testing.assert_array_equal(y, np.concatenate(parts, axis=1))


def test_blocks_do_not_show(random, monkeypatch):
    x, samples = random.standard_normal((6, 50)), np.arange(6)
    expected, _ = ops.dropout_forward(x, 0.5, STREAM, samples)
    for elements in (1, 7, 120):
        monkeypatch.setattr(
            numpy_dropout, "row_blocks", lambda rows, size, elements=elements: blocks.row_blocks(rows, size, elements)
        )
        np.testing.assert_array_equal(expected, ops.dropout_forward(x, 0.5, STREAM, samples)[0])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_so_many_are_dropped_as_the_rate_says_and_the_mean_stays(implementation, rate):
    x = np.ones((100, 1000), np.float32)
    y, mask = ops.dropout_forward(x, rate, STREAM, np.arange(100))
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(1 - mask.mean() - rate) < 5 * deviation
    assert_close(mask / (1 - rate), y, 1e-6)


def test_samples_layers_and_steps_differ(implementation):
    x = np.ones((2, 1000), np.float32)
    masks = [
        ops.dropout_forward(x, 0.5, rng.key(1, "dropout", layer, step), np.arange(2))[1]
        for layer, step in ((0, 0), (0, 1), (1, 0))
    ]
    draws = [row for mask in masks for row in mask]
    for first in range(len(draws)):
        for second in range(first):
            assert 0.4 < np.mean(draws[first] == draws[second]) < 0.6


def test_backward_is_adjoint_to_forward(implementation, random):
    x, grad = random.standard_normal((2, 6, 40)).astype(np.float32)
    y, mask = ops.dropout_forward(x, 0.3, STREAM, np.arange(6))
    grad_x = ops.dropout_backward(grad, mask, 0.3)
    assert_close(grad * mask / 0.7, grad_x, 1e-6)
    assert_adjoint(y, grad, x, grad_x)


def test_a_rate_of_zero_keeps_everything(implementation, random):
    x = random.standard_normal((3, 50)).astype(np.float32)
    y, mask = ops.dropout_forward(x, 0.0, STREAM, np.arange(3))
    assert mask.all()
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    x = np.ones((2, 3))
    with pytest.raises(ShapeError, match=r"rate \(=.*\) must be at least 0 and below 1"):
        ops.dropout_forward(x, rate, STREAM, np.arange(2))
    with pytest.raises(ShapeError, match="rate"):
        ops.dropout_backward(x, x > 0, rate)


def test_what_does_not_fit_is_refused():
    x = np.ones((2, 3))
    with pytest.raises(ShapeError, match=r"samples of shape \(3,\) for x of shape \(2, 3\)"):
        ops.dropout_forward(x, 0.5, STREAM, np.arange(3))
    with pytest.raises(ShapeError, match=r"elements of shape \(2,\) for x of shape \(2, 3\)"):
        ops.dropout_forward(x, 0.5, STREAM, np.arange(2), np.arange(2))
    with pytest.raises(ShapeError, match=r"mask is float64 of shape \(2, 3\); it must be bool"):
        ops.dropout_backward(x, x, 0.5)
