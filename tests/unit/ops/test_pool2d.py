"""Pooling on each implementation, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hpcnn import ops
from hpcnn.errors import ShapeError
from hpcnn.ops import backend
from tests import reference
from tests.checks import assert_adjoint, assert_close, assert_grad

NONE = ((0, 0), (0, 0))
# x shape, window, stride, padding
CASES = {
    "2x2": ((2, 6, 8, 3), (2, 2), (2, 2), NONE),
    "pixels left over": ((2, 7, 9, 3), (2, 2), (2, 2), NONE),
    "windows overlap": ((2, 7, 6, 3), (3, 3), (2, 2), NONE),
    "windows overlap in every pixel": ((1, 5, 5, 2), (3, 2), (1, 1), NONE),
    "padding": ((2, 7, 8, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "four different sides": ((1, 5, 6, 2), (3, 4), (2, 1), ((2, 0), (1, 3))),
    "gaps between windows": ((1, 9, 9, 2), (2, 1), (3, 4), NONE),
    "gaps wider than the padding": ((1, 6, 5, 2), (2, 2), (4, 3), ((1, 1), (1, 1))),
    "the whole image": ((3, 4, 5, 7), (4, 5), (4, 5), NONE),
    "a single pixel": ((2, 1, 1, 1), (1, 1), (1, 1), NONE),
    "a small image in a large window": ((1, 2, 1, 2), (4, 3), (1, 1), ((2, 1), (2, 2))),
    "more than 255 places": ((1, 18, 17, 2), (16, 17), (1, 1), NONE),
    "255 places": ((1, 18, 17, 2), (15, 17), (1, 1), NONE),
}
case = pytest.mark.parametrize(("shape", "window", "stride", "padding"), CASES.values(), ids=CASES.keys())


def draw(random, shape, window, stride, padding, dtype=np.float32):
    """Return x with many equal numbers, and grad_output."""
    output = (shape[0], *reference.output_size(shape[1:3], window, stride, padding), shape[3])
    return random.integers(-5, 6, shape).astype(dtype), random.standard_normal(output).astype(dtype)


@case
def test_maximum_and_its_place_equal_the_formula(implementation, random, shape, window, stride, padding):
    x, _ = draw(random, shape, window, stride, padding)
    y, argmax = ops.maxpool2d_forward(x, window, stride=stride, padding=padding)
    expected, places = reference.maxpool2d(x, window, stride, padding)
    np.testing.assert_array_equal(expected, y)
    np.testing.assert_array_equal(places, argmax)
    assert argmax.dtype == (np.uint8 if window[0] * window[1] <= 255 else np.int32)


@case
def test_maximum_gradient_equals_the_formula(implementation, random, shape, window, stride, padding):
    x, grad = draw(random, shape, window, stride, padding)
    _, argmax = ops.maxpool2d_forward(x, window, stride=stride, padding=padding)
    expected = reference.maxpool2d_gradient(grad, argmax, shape[1:3], window, stride, padding)
    actual = ops.maxpool2d_backward(grad, argmax, shape[1:3], window, stride=stride, padding=padding)
    assert_close(expected, actual, 1e-6)


@case
def test_average_and_its_gradient_equal_the_formula(implementation, random, shape, window, stride, padding):
    x, grad = draw(random, shape, window, stride, padding)
    y = ops.avgpool2d_forward(x, window, stride=stride, padding=padding)
    assert_close(reference.avgpool2d(x, window, stride, padding), y, 1e-6)
    actual = ops.avgpool2d_backward(grad, shape[1:3], window, stride=stride, padding=padding)
    assert_close(reference.avgpool2d_gradient(grad, shape[1:3], window, stride, padding), actual, 2e-6)


@case
def test_gradients_are_adjoint_to_forward(implementation, random, shape, window, stride, padding):
    x, grad = draw(random, shape, window, stride, padding)
    x += random.standard_normal(shape).astype(np.float32)
    y, argmax = ops.maxpool2d_forward(x, window, stride=stride, padding=padding)
    places = {"stride": stride, "padding": padding}
    # With the winners fixed, the maximum is linear as well.
    assert_adjoint(y, grad, x, ops.maxpool2d_backward(grad, argmax, shape[1:3], window, **places))
    y = ops.avgpool2d_forward(x, window, **places)
    assert_adjoint(y, grad, x, ops.avgpool2d_backward(grad, shape[1:3], window, **places))


@st.composite
def poolings(draw):
    """Shapes of a small pooling that fits, padding smaller than the window."""
    window = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    padding = tuple((draw(st.integers(0, extent - 1)), draw(st.integers(0, extent - 1))) for extent in window)
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 5)))
    stride = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    assume(0 not in reference.output_size(shape[1:3], window, stride, padding))
    return shape, window, stride, padding


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(poolings())
def test_any_small_pooling_equals_the_formula(implementation, pooling):
    shape, window, stride, padding = pooling
    places = {"stride": stride, "padding": padding}
    x, grad = draw(np.random.default_rng(2), *pooling)
    y, argmax = ops.maxpool2d_forward(x, window, **places)
    expected, expected_argmax = reference.maxpool2d(x, *pooling[1:])
    np.testing.assert_array_equal(expected, y)
    np.testing.assert_array_equal(expected_argmax, argmax)
    expected = reference.maxpool2d_gradient(grad, argmax, shape[1:3], *pooling[1:])
    assert_close(expected, ops.maxpool2d_backward(grad, argmax, shape[1:3], window, **places), 1e-6)
    assert_close(reference.avgpool2d(x, *pooling[1:]), ops.avgpool2d_forward(x, window, **places), 1e-6)
    expected = reference.avgpool2d_gradient(grad, shape[1:3], *pooling[1:])
    assert_close(expected, ops.avgpool2d_backward(grad, shape[1:3], window, **places), 2e-6)


def test_gradients_agree_with_central_differences(random):
    shape, window, stride, padding = CASES["four different sides"]
    places = {"stride": stride, "padding": padding}
    x = random.permutation(np.arange(np.prod(shape), dtype=np.float64)).reshape(shape)  # no two alike
    grad = draw(random, *CASES["four different sides"], np.float64)[1]
    _, argmax = ops.maxpool2d_forward(x, window, **places)
    assert_grad(
        lambda x: np.sum(ops.maxpool2d_forward(x, window, **places)[0] * grad),
        x,
        ops.maxpool2d_backward(grad, argmax, shape[1:3], window, **places),
    )
    assert_grad(
        lambda x: np.sum(ops.avgpool2d_forward(x, window, **places) * grad),
        x,
        ops.avgpool2d_backward(grad, shape[1:3], window, **places),
    )


def test_padding_never_wins_a_maximum(implementation):
    x = np.full((1, 3, 3, 2), -1e30, np.float32)
    y, argmax = ops.maxpool2d_forward(x, 3, stride=2, padding=1)
    np.testing.assert_array_equal(np.full((1, 2, 2, 2), -1e30, np.float32), y)
    assert [[4, 3], [1, 0]] == argmax[0, :, :, 0].tolist()


@pytest.mark.parametrize("place", range(4))
def test_a_nan_reaches_the_output_of_numpy(place):
    x = np.ones((1, 2, 2, 1), np.float32)
    x.reshape(-1)[place] = np.nan
    with backend.use("numpy"):
        assert np.isnan(ops.maxpool2d_forward(x, 2)[0]).all()
        assert np.isnan(ops.avgpool2d_forward(x, 2)).all()


def test_minus_infinity_has_a_place_too():
    x = np.full((1, 2, 2, 1), -np.inf)
    y, argmax = ops.maxpool2d_forward(x, 2, stride=1, padding=1)
    assert (y == -np.inf).all()
    assert [[3, 2, 2], [1, 0, 0], [1, 0, 0]] == argmax[0, :, :, 0].tolist()


def test_the_stride_is_the_window_when_left_out(random):
    x = random.standard_normal((2, 6, 6, 3))
    np.testing.assert_array_equal(
        ops.maxpool2d_forward(x, (2, 3), stride=(2, 3))[0], ops.maxpool2d_forward(x, (2, 3))[0]
    )
    np.testing.assert_array_equal(ops.avgpool2d_forward(x, (3, 2), stride=(3, 2)), ops.avgpool2d_forward(x, (3, 2)))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 7, 5, 2), (2, 4, 4, 19)])
def test_global_average_is_the_mean_of_each_channel(implementation, random, shape):
    x = random.standard_normal(shape).astype(np.float32)
    y = ops.global_avgpool_forward(x)
    assert_close(np.float64(x).mean((1, 2)), y, 1e-6)
    grad = random.standard_normal(y.shape).astype(np.float32)
    grad_x = ops.global_avgpool_backward(grad, shape[1:3])
    assert_close(np.broadcast_to(grad[:, None, None] / (shape[1] * shape[2]), shape), grad_x, 1e-6)
    assert_adjoint(y, grad, x, grad_x)


@pytest.mark.parametrize("padding", [((2, 0), (0, 0)), ((0, 0), (0, 3)), 2])
def test_maximum_pooling_refuses_padding_as_large_as_the_window(padding):
    with pytest.raises(ShapeError, match=r"maxpool2d: padding .* must be smaller than the window \(=\(2, 2\)\)"):
        ops.maxpool2d_forward(np.zeros((1, 8, 8, 1)), 2, stride=1, padding=padding)


def test_average_pooling_of_nothing_but_padding_is_zero(implementation):
    y = ops.avgpool2d_forward(np.ones((1, 2, 2, 1), np.float32), 2, stride=2, padding=2)
    assert_close(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])[None, :, :, None], y)
    grad = ops.avgpool2d_backward(np.ones((1, 3, 3, 1), np.float32), (2, 2), 2, stride=2, padding=2)
    assert_close(np.full((1, 2, 2, 1), 0.25), grad)


def test_what_does_not_fit_is_refused_with_its_numbers():
    with pytest.raises(ShapeError, match=r"W \(=2\) .* smaller than the window \(=3\)"):
        ops.maxpool2d_forward(np.zeros((1, 5, 2, 1)), 3)
    with pytest.raises(ShapeError, match=r"grad_output is .* \(1, 3, 3, 1\); it must be .* \(1, 2, 2, 1\)"):
        ops.avgpool2d_backward(np.zeros((1, 3, 3, 1)), (4, 4), 2)
    with pytest.raises(ShapeError, match=r"argmax is uint8 of shape \(1, 1, 2, 1\)"):
        ops.maxpool2d_backward(np.zeros((1, 2, 2, 1)), np.zeros((1, 1, 2, 1), np.uint8), (4, 4), 2)
    with pytest.raises(ShapeError, match=r"global_avgpool: x has shape \(2, 3\)"):
        ops.global_avgpool_forward(np.zeros((2, 3)))
