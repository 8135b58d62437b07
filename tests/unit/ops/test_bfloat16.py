"""Operators on bfloat16 arrays of the host: against loops in float64 on the same, rounded numbers.

A bfloat16 has 8 bits of precision, so rounding changes a number by at most 2^-8 of itself. Products of two are exact in
float32 and sums are kept in it, so a result has that one error, and a float32 result hardly any.
"""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.arrays import bfloat16
from hpcnn.ops import backend, cpu, onednn
from hpcnn.ops.cpu.widened import through_float32
from hpcnn.ops.onednn import library
from tests import reference
from tests.checks import assert_close

BFLOAT16 = bfloat16()
ONCE = 1.01 * 2.0**-8
FLOAT32 = 1e-5


@pytest.fixture(params=["numpy", "onednn", "onednn without instructions"], autouse=True)
def served(request, monkeypatch):
    """Serve by NumPy, by oneDNN, and by oneDNN as on a processor that knows nothing of bfloat16."""
    which, _, without = request.param.partition(" ")
    if which == "onednn" and not onednn.available():
        pytest.skip("the oneDNN library is not installed (pip install 'hpcnn[onednn]') or is switched off")
    if without:
        monkeypatch.setattr(library, "_has_bfloat16", lambda: False)
    with backend.use(which):
        yield


def rounded(random, *shape):
    return random.standard_normal(shape).astype(BFLOAT16)


def weights(random, *shape):
    """Return float32 numbers that bfloat16 has too, so that an implementation may round them."""
    return rounded(random, *shape).astype(np.float32)


CONVOLUTIONS = {
    "odd": ((3, 7, 5, 3), 5, (3, 3), {"padding": ((1, 1), (1, 1))}),
    "stride and dilation": (
        (2, 9, 11, 6),
        4,
        (3, 2),
        {"stride": (2, 1), "dilation": (1, 3), "padding": ((0, 2), (3, 1))},
    ),
    "1x1": ((3, 4, 5, 17), 33, (1, 1), {}),
    "1x1 with stride": ((2, 7, 6, 16), 16, (1, 1), {"stride": (2, 3)}),
    "groups": ((2, 6, 5, 4), 6, (3, 3), {"groups": 2, "padding": ((1, 1), (1, 1))}),
    "a group each channel": ((2, 6, 6, 16), 16, (3, 3), {"groups": 16, "padding": ((1, 1), (1, 1))}),
    "padding beyond the kernel": ((1, 3, 2, 2), 3, (2, 2), {"padding": ((3, 4), (2, 5))}),
    "wide with dilated rows": (  # oneDNN 3.2 gets the weight gradients of this one and the next wrong
        (2, 3, 33, 17),
        16,
        (2, 5),
        {"dilation": (2, 2), "padding": ((0, 0), (2, 3))},
    ),
    "stride beyond a narrow image": ((1, 7, 3, 3), 5, (1, 4), {"stride": (2, 4), "padding": ((0, 0), (2, 1))}),
    "wide": ((1, 3, 130, 2), 65, (3, 3), {"padding": ((1, 1), (1, 1))}),
}


@pytest.mark.parametrize(("shape", "filters", "size", "geometry"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution(random, shape, filters, size, geometry):
    x = rounded(random, *shape)
    weight = weights(random, filters, *size, shape[3] // geometry.get("groups", 1))
    bias = random.standard_normal(filters).astype(np.float32)
    y = ops.conv2d_forward(x, weight, bias, activation="leaky_relu", **geometry)
    assert y.dtype == BFLOAT16
    assert_close(reference.activation(reference.conv2d(x, weight, bias, **geometry), "leaky_relu"), y, ONCE)

    grad = rounded(random, *y.shape)
    grad_x, grad_weight, grad_bias = reference.conv2d_gradients(x, weight, grad, **geometry)
    actual = ops.conv2d_backward_input(grad, weight, shape[1:3], **geometry)
    assert actual.dtype == BFLOAT16
    assert_close(grad_x, actual, ONCE)
    out = np.full(weight.shape, np.nan, np.float32), np.full(filters, np.nan, np.float32)
    actual = ops.conv2d_backward_weight(x, grad, size, out=out, **geometry)
    assert actual[0] is out[0]
    assert actual[1] is out[1]
    assert_close(grad_weight, out[0], FLOAT32)
    assert_close(grad_bias, out[1], FLOAT32)
    alone, nothing = ops.conv2d_backward_weight(x, grad, size, bias=False, **geometry)
    assert alone.dtype == np.float32
    assert nothing is None
    assert_close(grad_weight, alone, FLOAT32)


def test_weights_are_rounded_to_nearest():
    """1 + 3/2 2^-8 lies nearest to 1 + 2^-7; cut off, it would be 1."""
    weight = np.full((16, 1, 1, 4), 1 + 1.5 * 2.0**-8, np.float32)
    y = ops.conv2d_forward(np.ones((1, 3, 3, 4), BFLOAT16), weight)
    np.testing.assert_array_equal(4 * (1 + 2.0**-7), y.astype(np.float64))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("samples", [1, 5, 301])
def test_linear(random, samples, order):
    x, weight = rounded(random, samples, 19), np.asarray(weights(random, 7, 19), order=order)
    bias, grad = random.standard_normal(7).astype(np.float32), rounded(random, samples, 7)
    for offset, kind in ((bias, "relu"), (None, None)):
        y = ops.linear_forward(x, weight, offset, activation=kind)
        assert y.dtype == BFLOAT16
        assert_close(reference.activation(reference.linear(x, weight, offset), kind), y, ONCE)
    grad_x, grad_weight, grad_bias = reference.linear_gradients(x, weight, grad)
    actual = ops.linear_backward_input(grad, weight)
    assert actual.dtype == BFLOAT16
    assert_close(grad_x, actual, ONCE)
    out = np.full_like(weight, np.nan), np.full(7, np.nan, np.float32)
    ops.linear_backward_weight(x, grad, out=out)
    assert_close(grad_weight, out[0], FLOAT32)
    assert_close(grad_bias, out[1], FLOAT32)
    assert ops.linear_backward_weight(x, grad, bias=False)[0].dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "window", "stride", "padding"),
    [
        ((2, 6, 8, 16), (2, 2), (2, 2), ((0, 0), (0, 0))),
        ((2, 7, 9, 5), (3, 3), (1, 2), ((1, 1), (1, 1))),  # sums of up to six gradients
        ((1, 8, 7, 3), (2, 3), (3, 4), ((0, 1), (1, 0))),
        ((1, 19, 17, 4), (17, 16), (1, 1), ((0, 0), (0, 0))),  # places beyond bytes
    ],
)
def test_pooling(random, shape, window, stride, padding):
    x, geometry = rounded(random, *shape), {"stride": stride, "padding": padding}
    y, argmax = ops.maxpool2d_forward(x, window, **geometry)
    expected, place = reference.maxpool2d(x, window, **geometry)
    np.testing.assert_array_equal(expected, y.astype(np.float64))
    np.testing.assert_array_equal(place, argmax)
    grad = rounded(random, *y.shape)
    mean = ops.avgpool2d_forward(x, window, **geometry)
    assert_close(reference.avgpool2d(x, window, **geometry), mean, ONCE)
    actual = ops.maxpool2d_backward(grad, argmax, shape[1:3], window, **geometry)
    assert_close(reference.maxpool2d_gradient(grad, place, shape[1:3], window, **geometry), actual, ONCE)
    spread = ops.avgpool2d_backward(grad, shape[1:3], window, **geometry)
    assert_close(reference.avgpool2d_gradient(grad, shape[1:3], window, **geometry), spread, ONCE)
    assert {BFLOAT16} == {array.dtype for array in (y, mean, actual, spread)}


def test_global_average_pooling(random):
    x, grad = rounded(random, 3, 7, 5, 19), rounded(random, 3, 19)
    y, grad_x = ops.global_avgpool_forward(x), ops.global_avgpool_backward(grad, (7, 5))
    assert y.dtype == grad_x.dtype == BFLOAT16
    assert_close(np.float64(x).mean((1, 2)), y, ONCE)
    assert_close(np.broadcast_to(np.float64(grad)[:, None, None] / 35, x.shape), grad_x, ONCE)


@pytest.mark.parametrize("kind", ["relu", "leaky_relu"])
def test_activations_and_sums(random, kind):
    x, other, grad = (rounded(random, 3, 5, 7, 11) for _ in range(3))
    y = ops.activation_forward(x, kind)
    grad_x = ops.activation_backward(grad, y, kind)
    total = ops.add_forward(x, other, kind)
    assert y.dtype == grad_x.dtype == total.dtype == BFLOAT16
    assert_close(reference.activation(np.float64(x), kind), y, ONCE)
    assert_close(reference.activation_gradient(np.float64(grad), np.float64(x), kind), grad_x, ONCE)
    assert_close(reference.activation(np.float64(x) + np.float64(other), kind), total, ONCE)
    assert_close(np.float64(x) + np.float64(other), ops.add_forward(x, other), ONCE)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(7, 3, 4, 5), (30, 17)])
def test_batchnorm_alone_and_over_two_parts(random, shape, activation):
    x, grad = rounded(random, *shape), rounded(random, *shape)
    gamma = random.uniform(0.5, 1.5, shape[-1]).astype(np.float32)
    beta = random.standard_normal(shape[-1]).astype(np.float32)
    options = {"epsilon": 1e-3, "activation": activation}
    exact = reference.batchnorm_statistics(x)
    for one, other in zip(exact, ops.batchnorm_statistics(x), strict=True):
        assert other.dtype.itemsize >= 4
        assert_close(one, other, 1e-6)

    y, mean, var, mask = ops.batchnorm_forward(x, gamma, beta, **options)
    gradients = ops.batchnorm_backward(grad, x, gamma, mean, var, mask, **options)
    assert y.dtype == gradients[0].dtype == BFLOAT16
    assert gradients[1].dtype == gradients[2].dtype == np.float32
    assert_close(reference.batchnorm(x, gamma, beta, 1e-3, activation), y, ONCE)
    expected = reference.batchnorm_gradients(grad, x, gamma, beta, 1e-3, activation)
    assert_close(expected[0], gradients[0], ONCE)
    tolerance = FLOAT32 if activation != "leaky_relu" else ONCE  # oneDNN rounds the gradient behind the activation
    assert_close(expected[1], gradients[1], tolerance)
    assert_close(expected[2], gradients[2], tolerance)

    sums, parts = [], (slice(3), slice(3, None))
    masks = [ops.batchnorm_forward(x[p], gamma, beta, statistics=exact, **options)[3] for p in parts]
    arguments = [(grad[p], x[p], gamma, *exact, mask) for p, mask in zip(parts, masks, strict=True)]
    options["count"] = x.size // shape[-1]
    for part in arguments:
        ops.batchnorm_backward(*part, reduce_sum=lambda s: sums.append(s.copy()), **options)
    both = [ops.batchnorm_backward(*a, reduce_sum=lambda s: np.copyto(s, sum(sums)), **options) for a in arguments]
    # What the statistics add comes to a number that is rounded already.
    assert_close(expected[0], np.concatenate([part[0] for part in both]), 2 * ONCE)
    for position in (1, 2):
        assert_close(expected[position], sum(part[position] for part in both), tolerance)


def test_dropout_and_loss(random):
    x, samples, elements = rounded(random, 5, 13), np.arange(5), np.arange(13)
    y, mask = ops.dropout_forward(x, 0.3, 1, samples, elements)
    grad_x = ops.dropout_backward(x, mask, 0.3)
    assert y.dtype == grad_x.dtype == BFLOAT16
    assert 0 < np.count_nonzero(mask) < mask.size
    for array in (y, grad_x):
        assert_close(np.float64(x) * mask / 0.7, array, ONCE)
    labels = random.integers(13, size=5)
    loss, hits, grad = ops.softmax_cross_entropy(x, labels, global_batch=9, label_smoothing=0.1)
    expected = reference.softmax_cross_entropy(np.float64(x), labels, 9, 0.1)
    assert grad.dtype == BFLOAT16
    assert loss == pytest.approx(expected[0], rel=1e-12)
    assert hits == expected[1]
    assert_close(expected[2], grad, ONCE)


def test_an_output_that_is_its_own_mask_is_rounded_once_and_other_types_pass_through():
    def operator(x, scale, *, shift):
        y = x * scale + shift
        return y, y, scale

    wrapped = through_float32(operator)
    scale = np.full(3, 1.5, np.float32)
    y, mask, given = wrapped(np.ones(3, BFLOAT16), scale, shift=2.0**-12)
    assert y is mask
    assert y.dtype == BFLOAT16
    assert given is scale
    np.testing.assert_array_equal(1.5, y.astype(np.float32))
    y, mask, _ = wrapped(np.ones(3), scale, shift=0.0)
    assert y.dtype == mask.dtype == np.float64
    assert cpu.add_forward(np.ones(3, BFLOAT16), np.ones(3, BFLOAT16)).dtype == BFLOAT16
