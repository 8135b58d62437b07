"""Batch normalisation on each implementation, against the chain rule in float64; alone and spread over arrays."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.errors import ShapeError
from hpcnn.ops import backend
from hpcnn.ops.cpu import batchnorm as numpy_batchnorm
from hpcnn.ops.cpu import blocks
from tests import reference
from tests.checks import assert_close, assert_grad

SHAPES = [(4, 5, 3, 7), (2, 1, 1, 1), (9, 13), (3, 4, 4, 64), (1, 6, 5, 2), (2, 3, 3, 600)]
EPSILON = 1e-3
ACTIVATIONS = [None, "relu", "leaky_relu"]


def draw(random, shape, dtype=np.float32):
    """Return x whose channels differ in mean and spread, gamma, beta, grad_output."""
    channels = shape[-1]
    x = random.standard_normal(shape) * random.uniform(0.5, 2.0, channels) + random.standard_normal(channels)
    gamma, beta = random.uniform(0.5, 1.5, channels), random.standard_normal(channels)
    return [array.astype(dtype) for array in (x, gamma, beta, random.standard_normal(shape))]


def whole(x, gamma, beta, grad, activation, **options):
    """Return y and the three gradients."""
    y, mean, var, mask = ops.batchnorm_forward(x, gamma, beta, epsilon=EPSILON, activation=activation)
    options = {"epsilon": EPSILON, "activation": activation} | options
    return y, *ops.batchnorm_backward(grad, x, gamma, mean, var, mask, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_equal_the_formula(implementation, random, shape):
    x = draw(random, shape)[0]
    for expected, actual in zip(reference.batchnorm_statistics(x), ops.batchnorm_statistics(x), strict=True):
        assert actual.shape == (shape[-1],)
        assert_close(expected, actual, 2e-6)


def test_a_large_mean_does_not_spoil_a_small_variance(implementation, random):
    x = (1000.0 + random.standard_normal((64, 8, 8, 5))).astype(np.float32)
    mean, var = ops.batchnorm_statistics(x)
    expected_mean, expected_var = reference.batchnorm_statistics(x)
    assert_close(expected_mean, mean, 1e-6)
    assert_close(expected_var, var, 1e-4)
    y = ops.batchnorm_forward(x, np.ones(5, np.float32), np.zeros(5, np.float32), epsilon=EPSILON)[0]
    assert_close(reference.batchnorm(x, 1.0, 0.0, EPSILON), y, 1e-4)


def test_a_mean_that_float32_cannot_hold_is_made_up_for(random):
    x = (2.0**20 + random.standard_normal((50, 7, 3))).astype(np.float32)  # in steps of 1/8, its mean is not
    gamma, beta = np.ones(3, np.float32), np.zeros(3, np.float32)
    expected_mean, expected_var = reference.batchnorm_statistics(x)
    assert abs(expected_mean - expected_mean.astype(np.float32)).max() > 0.01
    grad = (1.0 + (x - expected_mean)).astype(np.float32)
    with backend.use("numpy"):
        mean, var = ops.batchnorm_statistics(x)
        y, *gradients = whole(x, gamma, beta, grad, None)
    assert_close(expected_mean, mean, 1e-12)
    assert_close(expected_var, var, 1e-6)
    assert_close(reference.batchnorm(x, 1.0, 0.0, EPSILON), y, 1e-5)
    expected = reference.batchnorm_gradients(grad, x, gamma, beta, EPSILON)
    # What is left of this gradient in x is epsilon's share, so compare with its largest term.
    assert abs(expected[0] - gradients[0]).max() < 1e-5 * abs(grad).max()
    assert_close(expected[1], gradients[1], 1e-5)
    assert_close(expected[2], gradients[2], 1e-5)


def test_statistics_of_a_million_positions_keep_their_digits():
    x = np.full((1024, 1024, 1), 1 / 3, np.float32)
    x[::2] = 2 / 3
    mean, var = ops.cpu.batchnorm_statistics(x)
    assert_close([0.5], mean, 1e-7)
    assert_close([1 / 36], var, 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_gradients_equal_the_formula(implementation, random, shape, activation):
    x, gamma, beta, grad = draw(random, shape)
    y, *gradients = whole(x, gamma, beta, grad, activation)
    assert y.dtype == np.float32
    assert_close(reference.batchnorm(x, gamma, beta, EPSILON, activation), y, 1e-5)
    expected = reference.batchnorm_gradients(grad, x, gamma, beta, EPSILON, activation)
    # The three terms of the input's gradient cancel where positions are few: the largest term sets the rounding.
    var = reference.batchnorm_statistics(x)[1]
    largest_term = abs(gamma / np.sqrt(var + EPSILON) * grad).max()
    assert abs(gradients[0] - expected[0]).max() <= 5e-6 * largest_term
    assert_close(expected[1], gradients[1], 2e-5, "gradient of gamma")
    assert_close(expected[2], gradients[2], 2e-5, "gradient of beta")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_agree_with_central_differences(random, activation):
    x, gamma, beta, grad = draw(random, (3, 2, 3, 4), np.float64)
    near_zero = abs(reference.batchnorm(x, gamma, beta, EPSILON)) < 1e-3
    assert not near_zero.any(), "central differences across the kink say nothing"
    _, *gradients = whole(x, gamma, beta, grad, activation)

    def total(x, gamma, beta):
        return np.sum(ops.batchnorm_forward(x, gamma, beta, epsilon=EPSILON, activation=activation)[0] * grad)

    assert_grad(lambda x: total(x, gamma, beta), x, gradients[0], 1e-6)
    assert_grad(lambda gamma: total(x, gamma, beta), gamma, gradients[1], 1e-6)
    assert_grad(lambda beta: total(x, gamma, beta), beta, gradients[2], 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cuts", [[2], [1, 2, 6]])
def test_a_batch_spread_over_arrays_equals_the_whole(implementation, random, activation, cuts):
    x, gamma, beta, grad = draw(random, (7, 3, 4, 5))
    expected = reference.batchnorm_gradients(grad, x, gamma, beta, EPSILON, activation)
    statistics = reference.batchnorm_statistics(x)
    parts, count = list(zip(np.split(x, cuts), np.split(grad, cuts), strict=True)), x.size // 5

    def backward(reduce_sum):
        results = []
        for part, part_grad in parts:
            y, mean, var, mask = ops.batchnorm_forward(
                part, gamma, beta, epsilon=EPSILON, activation=activation, statistics=statistics
            )
            options = {"epsilon": EPSILON, "activation": activation, "count": count, "reduce_sum": reduce_sum}
            results.append((y, *ops.batchnorm_backward(part_grad, part, gamma, mean, var, mask, **options)))
        return results

    # All ranks meet in reduce_sum; here the parts come one by one, so a first round collects what the second sums.
    sums = []
    backward(lambda array: sums.append(array.copy()))
    assert all(array.dtype == np.float64 for array in sums)

    def reduce_sum(array):
        array[...] = np.sum(sums, axis=0)

    y, *gradients = zip(*backward(reduce_sum), strict=True)
    assert_close(reference.batchnorm(x, gamma, beta, EPSILON, activation), np.concatenate(y), 1e-5)
    assert_close(expected[0], np.concatenate(gradients[0]), 2e-5, "gradient of x")
    assert_close(expected[1], np.sum(gradients[1], axis=0), 2e-5, "gradient of gamma")
    assert_close(expected[2], np.sum(gradients[2], axis=0), 2e-5, "gradient of beta")


def test_given_statistics_are_used_and_returned(implementation, random):
    x, gamma, beta, _ = draw(random, (2, 3, 3, 4))
    statistics = random.standard_normal(4).astype(np.float32), random.uniform(0.5, 2.0, 4).astype(np.float32)
    y, mean, var, mask = ops.batchnorm_forward(x, gamma, beta, epsilon=EPSILON, statistics=statistics)
    assert_close(reference.batchnorm(x, gamma, beta, EPSILON, None, statistics), y, 1e-5)
    np.testing.assert_array_equal(statistics[0], mean)
    np.testing.assert_array_equal(statistics[1], var)
    assert mask is None


def test_out_is_overwritten_and_returned(implementation, random):
    x, gamma, beta, grad = draw(random, (2, 3, 3, 4))
    out = np.full(4, np.nan, np.float32), np.full(4, np.nan, np.float32)
    _, _, grad_gamma, grad_beta = whole(x, gamma, beta, grad, "relu", out=out)
    assert grad_gamma is out[0]
    assert grad_beta is out[1]
    _, expected_gamma, expected_beta = reference.batchnorm_gradients(grad, x, gamma, beta, EPSILON, "relu")
    assert_close(expected_gamma, grad_gamma)
    assert_close(expected_beta, grad_beta)


def test_inputs_stay_as_they_are(implementation, random):
    arrays = draw(random, (2, 3, 3, 4))
    before = [array.copy() for array in arrays]
    for activation in ACTIVATIONS:
        whole(*arrays, activation)
    for kept, array in zip(before, arrays, strict=True):
        np.testing.assert_array_equal(kept, array)


def test_blocks_do_not_show(random, monkeypatch):
    arrays = draw(random, (5, 3, 3, 4), np.float64)
    expected = whole(*arrays, "relu")
    monkeypatch.setattr(numpy_batchnorm, "row_blocks", lambda rows, elements: blocks.row_blocks(rows, elements, 28))
    for one, other in zip(expected, whole(*arrays, "relu"), strict=True):
        assert_close(one, other, 1e-13)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (257, 1), (1025, 3), (300, 511), (7, 5000), (513, 512)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_column_sums_are_those_of_all_rows(random, rows, columns, dtype):
    x = random.standard_normal((rows, columns)).astype(dtype)
    sums = blocks.column_sums(x)
    assert sums.dtype == np.float64
    assert_close(np.float64(x).sum(axis=0), sums, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": np.zeros(3)}, r"gamma is .* \(3,\); it must be .* \(4,\)"),
        ({"beta": np.zeros((4, 1))}, r"beta is .* \(4, 1\)"),
        ({"x": np.zeros(4)}, r"x has shape \(4,\); it must be \(N, ..., C\)"),
        ({"x": np.zeros((0, 4))}, "every extent at least 1"),
        ({"activation": "elu"}, "activation .* is unknown"),
        ({"statistics": (np.zeros(4), np.zeros(5))}, r"statistics is .* \(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(options, message):
    options = {"x": np.zeros((2, 4)), "gamma": np.ones(4), "beta": np.zeros(4), "epsilon": EPSILON} | options
    with pytest.raises(ShapeError, match=message):
        ops.batchnorm_forward(**options)


def test_an_activation_without_its_mask_is_refused():
    x, channels = np.ones((2, 4)), np.ones(4)
    with pytest.raises(ShapeError, match="needs the mask of its forward pass"):
        ops.batchnorm_backward(x, x, channels, channels, channels, None, epsilon=EPSILON, activation="relu")
