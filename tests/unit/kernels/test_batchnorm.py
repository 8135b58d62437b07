"""Kernels of batch normalisation against the chain rule in float64; alone and spread over arrays."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.ops import cpu
from hpcnn.ops.cuda import batchnorm
from tests import reference
from tests.checks import assert_close
from tests.mixed import BFLOAT16, DTYPES, unaligned

SHAPES = [(4, 5, 3, 7), (2, 1, 1, 1), (9, 13), (3, 4, 4, 64), (3, 9, 7, 24), (2, 3, 3, 600)]
EPSILON = 1e-3
ACTIVATIONS = [None, "relu", "leaky_relu"]
# Of an output in the type; sums and parameters' gradients are float32 and better.
ROUNDING = {DTYPES[0]: 2e-6, BFLOAT16: 4e-3}


def draw(random, shape, dtype=np.float32):
    """Return x whose channels differ in mean and spread, grad_output, and gamma and beta, which are float32."""
    channels = shape[-1]
    x = random.standard_normal(shape) * random.uniform(0.5, 2.0, channels) + random.standard_normal(channels)
    gamma, beta = random.uniform(0.5, 1.5, channels), random.standard_normal(channels)
    grad = random.standard_normal(shape)
    return x.astype(dtype), grad.astype(dtype), gamma.astype(np.float32), beta.astype(np.float32)


def run(device, x, grad, gamma, beta, activation=None, statistics=None, **options):
    """Return y, mean, var and the three gradients, on the host."""
    x, grad, gamma, beta = (device.upload(array) for array in (x, grad, gamma, beta))
    both = {"epsilon": EPSILON, "activation": activation}
    y, mean, var, mask = batchnorm.batchnorm_forward(x, gamma, beta, statistics=statistics, **both)
    assert (mask is None) == (activation is None)
    gradients = batchnorm.batchnorm_backward(grad, x, gamma, mean, var, mask, **both, **options)
    return [device.download(array) for array in (y, mean, var, *gradients)]


def assert_gradients(expected, gradients, x, grad, gamma, dtype):
    """The three terms of the input's gradient cancel where positions are few: the largest term sets the rounding."""
    deviation = np.sqrt(reference.batchnorm_statistics(x)[1] + EPSILON)
    largest = abs(gamma / deviation * np.float64(grad)).max()
    assert abs(gradients[0] - expected[0]).max() <= ROUNDING[dtype] * largest
    for which in (1, 2):
        scale = abs(np.float64(grad)).sum(axis=tuple(range(grad.ndim - 1))).max()
        assert gradients[which].dtype == np.float32
        assert abs(gradients[which] - expected[which]).max() <= 3e-7 * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_those_of_float64(device, random, shape, dtype):
    x = draw(random, shape, dtype)[0]
    for expected, actual in zip(
        reference.batchnorm_statistics(x), batchnorm.batchnorm_statistics(device.upload(x)), strict=True
    ):
        assert actual.dtype == np.float64
        assert actual.shape == (shape[-1],)
        assert_close(expected, device.download(actual), 1e-13)


@pytest.mark.parametrize(("mean", "tolerance"), [(1e3, 1e-12), (2.0**20, 1e-12), (1e6, 1e-12)])
def test_a_large_mean_does_not_spoil_a_small_variance(device, random, mean, tolerance):
    x = (mean + random.standard_normal((30, 7, 5))).astype(np.float32)
    expected = reference.batchnorm_statistics(x)
    actual = [device.download(array) for array in batchnorm.batchnorm_statistics(device.upload(x))]
    assert_close(expected[0], actual[0], 1e-14)
    assert_close(expected[1], actual[1], tolerance)
    gamma, beta = np.ones(5, np.float32), np.zeros(5, np.float32)
    grad = (1.0 + (x - expected[0])).astype(np.float32)
    y, _, _, *gradients = run(device, x, grad, gamma, beta)
    assert_close(reference.batchnorm(x, 1.0, 0.0, EPSILON), y, 1e-5)
    assert_gradients(reference.batchnorm_gradients(grad, x, gamma, beta, EPSILON), gradients, x, grad, gamma, x.dtype)


def test_a_first_position_far_from_the_others_spoils_nothing(device, random):
    x = random.standard_normal((500, 3)).astype(np.float32)
    x[0] = 1e6
    expected = reference.batchnorm_statistics(x)
    for one, other in zip(expected, batchnorm.batchnorm_statistics(device.upload(x)), strict=True):
        assert_close(one, device.download(other), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_gradients_equal_the_formula(device, random, shape, activation, dtype):
    x, grad, gamma, beta = draw(random, shape, dtype)
    y, _, _, *gradients = run(device, x, grad, gamma, beta, activation)
    assert y.dtype == gradients[0].dtype == dtype
    assert_close(reference.batchnorm(x, gamma, beta, EPSILON, activation), y, ROUNDING[dtype])
    expected = reference.batchnorm_gradients(grad, x, gamma, beta, EPSILON, activation)
    assert_gradients(expected, gradients, x, grad, gamma, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_batch_spread_over_arrays_equals_the_whole(device, random, activation, dtype):
    x, grad, gamma, beta = draw(random, (7, 3, 4, 5), dtype)
    statistics = [device.upload(array) for array in reference.batchnorm_statistics(x)]
    parts = [(x[s], grad[s]) for s in (slice(2), slice(2, 3), slice(3, 7))]
    count = x.size // 5

    def backward(reduce_sum):
        options = {"statistics": statistics, "count": count, "reduce_sum": reduce_sum}
        return [run(device, *part, gamma, beta, activation, **options) for part in parts]

    # All ranks meet in reduce_sum; here the parts come one by one, so a first round collects what the second sums.
    sums = []
    backward(lambda array: sums.append(device.download(array)))
    assert all(array.dtype == np.float64 and array.shape == (2, 5) for array in sums)

    def reduce_sum(array):
        array[...] = device.upload(np.sum(sums, axis=0))

    y, _, _, *gradients = zip(*backward(reduce_sum), strict=True)
    assert_close(reference.batchnorm(x, gamma, beta, EPSILON, activation), np.concatenate(y), ROUNDING[dtype])
    expected = reference.batchnorm_gradients(grad, x, gamma, beta, EPSILON, activation)
    together = [np.concatenate(gradients[0]), *(np.sum(parts, axis=0) for parts in gradients[1:])]
    assert_gradients(expected, together, x, grad, gamma, dtype)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_given_statistics_are_used_and_returned(device, random, kind):
    x, _, gamma, beta = draw(random, (2, 3, 3, 4))
    statistics = random.standard_normal(4).astype(kind), random.uniform(0.5, 2.0, 4).astype(kind)
    given = tuple(device.upload(array) for array in statistics)
    arrays = (device.upload(array) for array in (x, gamma, beta))
    y, mean, var, mask = batchnorm.batchnorm_forward(*arrays, epsilon=EPSILON, statistics=given)
    assert_close(reference.batchnorm(x, gamma, beta, EPSILON, None, statistics), device.download(y), 2e-6)
    assert mean is given[0]
    assert var is given[1]
    assert mask is None


def test_out_is_overwritten_and_returned(device, random):
    x, grad, gamma, beta = draw(random, (2, 3, 3, 4))
    room = device.upload(np.full(9, np.nan, np.float32))
    out = room[:4], room[5:]
    gradients = run(device, x, grad, gamma, beta, "relu", out=out)[3:]
    expected = reference.batchnorm_gradients(grad, x, gamma, beta, EPSILON, "relu")
    assert_gradients(expected, gradients, x, grad, gamma, x.dtype)
    np.testing.assert_array_equal([*gradients[1], np.nan, *gradients[2]], device.download(room))


def test_what_was_cut_to_zero_forward_gets_no_gradient(device, random):
    x, grad, gamma, beta = draw(random, (40, 5, 8), BFLOAT16)
    ones = np.ones_like(grad)
    sums = []
    x, ones, gamma, beta = (device.upload(array) for array in (x, ones, gamma, beta))
    both = {"epsilon": EPSILON, "activation": "relu"}
    y, mean, var, mask = batchnorm.batchnorm_forward(x, gamma, beta, **both)
    batchnorm.batchnorm_backward(
        ones, x, gamma, mean, var, mask, **both, reduce_sum=lambda array: sums.append(device.download(array))
    )
    positive = np.count_nonzero(np.float32(device.download(y)) > 0, axis=(0, 1))
    np.testing.assert_array_equal(positive, sums[0][0])


def test_channels_that_begin_anywhere(device, random):
    x, _, gamma, beta = draw(random, (4, 5, 16), BFLOAT16)
    odd = unaligned(device, x)
    y = batchnorm.batchnorm_forward(odd, device.upload(gamma), device.upload(beta), epsilon=EPSILON)[0]
    assert_close(reference.batchnorm(x, gamma, beta, EPSILON), device.download(y), ROUNDING[BFLOAT16])
    assert_close(np.float64(x).mean((0, 1)), device.download(batchnorm.batchnorm_statistics(odd)[0]), 1e-13)


def test_two_runs_have_the_same_bits_and_the_public_functions_come_here(on_device, random):
    arrays = [on_device.upload(array) for array in draw(random, (5, 9, 7, 24))]
    x, grad, gamma, beta = arrays
    results = []
    for _ in range(2):
        y, mean, var, mask = ops.batchnorm_forward(x, gamma, beta, epsilon=EPSILON, activation="relu")
        assert mask.shape == (3, 24)
        both = {"epsilon": EPSILON, "activation": "relu"}
        gradients = ops.batchnorm_backward(grad, x, gamma, mean, var, mask, **both)
        results.append([on_device.download(array).tobytes() for array in (y, mean, var, *gradients)])
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_running_statistics_have_the_bits_of_numpy(device, random, dtype):
    mean, var = random.standard_normal(300).astype(dtype), random.uniform(0.5, 2.0, 300).astype(dtype)
    before = random.standard_normal(300).astype(np.float32), random.uniform(0.5, 2.0, 300).astype(np.float32)
    expected = [array.copy() for array in before]
    cpu.batchnorm_track(np.float64(mean), np.float64(var), *expected, momentum=0.1, count=7)
    running = [device.upload(array) for array in before]
    batchnorm.batchnorm_track(device.upload(mean), device.upload(var), *running, momentum=0.1, count=7)
    for one, other in zip(expected, running, strict=True):
        assert np.array_equal(one, device.download(other))
