"""Fully connected layers on each implementation, against loops in float64."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from hpcnn import arrays, ops
from hpcnn.errors import ShapeError
from tests import reference
from tests.checks import assert_adjoint, assert_close, assert_grad

SIZES = [(1, 1, 1), (3, 7, 5), (13, 1, 9), (1, 33, 2), (5, 64, 31)]
# Of weights beyond a cache: for each there is another way, by their order and the number of samples.
LARGE_SIZES = [(8, 1031, 1021), (7, 1021, 1031), (65, 1031, 1021)]
ORDERS = ["C", "F"]
TYPES = [np.float32, np.float64]
TOLERANCES = {np.float32: 1e-5, np.float64: 1e-13}


def draw(random, samples, inputs, outputs, dtype=np.float32):
    """Return x, weight, bias and grad_output."""
    shapes = (samples, inputs), (outputs, inputs), (outputs,), (samples, outputs)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TYPES)
def test_forward_equals_the_formula(implementation, random, sizes, activation, with_bias, order, dtype):
    x, weight, bias, _ = draw(random, *sizes, dtype)
    bias = bias if with_bias else None
    expected = reference.activation(reference.linear(x, weight, bias), activation)
    actual = ops.linear_forward(x, np.asarray(weight, order=order), bias, activation=activation)
    assert dtype == actual.dtype
    assert_close(expected, actual, TOLERANCES[dtype])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_equal_the_formula(implementation, random, sizes, order, dtype):
    x, weight, _, grad = draw(random, *sizes, dtype)
    grad_x, grad_weight, grad_bias = reference.linear_gradients(x, weight, grad)
    assert_close(grad_x, ops.linear_backward_input(grad, np.asarray(weight, order=order)), TOLERANCES[dtype])
    actual = ops.linear_backward_weight(x, grad)
    assert_close(grad_weight, actual[0], TOLERANCES[dtype])
    assert_close(grad_bias, actual[1], TOLERANCES[dtype])


@pytest.mark.parametrize("sizes", LARGE_SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_large_weights_equal_the_formula(implementation, random, sizes, order):
    x, weight, bias, grad = draw(random, *sizes)
    lying = np.asarray(weight, order=order)
    assert_close(reference.linear(x, weight, bias), ops.linear_forward(x, lying, bias))
    grad_x, grad_weight, grad_bias = reference.linear_gradients(x, weight, grad)
    assert_close(grad_x, ops.linear_backward_input(grad, lying))
    out = np.full_like(lying, np.nan), np.full_like(bias, np.nan)
    ops.linear_backward_weight(x, grad, out=out)
    assert_close(grad_weight, out[0])
    assert_close(grad_bias, out[1])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_both_gradients_are_adjoint_to_forward(implementation, random, sizes, order):
    x, weight, _, grad = draw(random, *sizes)
    weight = np.asarray(weight, order=order)
    y = ops.linear_forward(x, weight)
    assert_adjoint(y, grad, x, ops.linear_backward_input(grad, weight))
    assert_adjoint(y, grad, weight, ops.linear_backward_weight(x, grad, bias=False)[0])


def test_gradients_agree_with_central_differences(random):
    x, weight, bias, grad = draw(random, 3, 5, 4, np.float64)
    assert_grad(
        lambda x: np.sum(ops.linear_forward(x, weight, bias) * grad), x, ops.linear_backward_input(grad, weight)
    )
    grad_weight, grad_bias = ops.linear_backward_weight(x, grad)
    assert_grad(lambda w: np.sum(ops.linear_forward(x, w, bias) * grad), weight, grad_weight)
    assert_grad(lambda b: np.sum(ops.linear_forward(x, weight, b) * grad), bias, grad_bias)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_out_is_overwritten_and_returned(implementation, random, order, with_bias, dtype):
    x, weight, bias, grad = draw(random, 5, 7, 3, dtype)
    flat = np.full(weight.size + bias.size, np.nan, dtype)
    out = flat[: weight.size].reshape(weight.shape, order=order), flat[weight.size :] if with_bias else None
    grad_weight, grad_bias = ops.linear_backward_weight(x, grad, bias=with_bias, out=out)
    assert grad_weight is out[0]
    assert grad_bias is out[1]
    _, expected_weight, expected_bias = reference.linear_gradients(x, weight, grad)
    assert_close(expected_weight, flat[: weight.size].reshape(weight.shape, order=order), TOLERANCES[dtype])
    if with_bias:
        assert_close(expected_bias, flat[weight.size :], TOLERANCES[dtype])
    else:
        assert np.isnan(flat[weight.size :]).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_of_a_range_of_input_features_are_one_stretch_of_memory(implementation, random, dtype):
    x, weight, _, grad = draw(random, 6, 11, 5, dtype)
    flat = np.full(weight.size, np.nan, dtype)
    start, stop = 3, 7
    stretch = flat[5 * start : 5 * stop].reshape(stop - start, 5).T
    ops.linear_backward_weight(np.ascontiguousarray(x[:, start:stop]), grad, bias=False, out=(stretch, None))
    _, expected, _ = reference.linear_gradients(x, weight, grad)
    assert_close(expected[:, start:stop].T.ravel(), flat[5 * start : 5 * stop], TOLERANCES[dtype])
    assert np.isnan(flat[: 5 * start]).all()
    assert np.isnan(flat[5 * stop :]).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("samples", [4, 16])
def test_nothing_copies_a_weight_or_its_gradient(implementation, random, order, samples):
    x, weight, bias, grad = draw(random, samples, 1536, 2048)
    weight = np.asarray(weight, order=order)
    out = np.empty_like(weight), np.empty_like(bias)

    def peak(call):
        """Bytes taken while it runs for the second time: the first makes what is kept between calls."""
        call()
        arrays.release_pool()
        tracemalloc.start()
        call()
        num_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return num_bytes

    assert peak(lambda: np.array(weight)) >= weight.nbytes, "copies are not seen"
    assert peak(lambda: ops.linear_forward(x, weight, bias)) < weight.nbytes / 8
    assert peak(lambda: ops.linear_backward_input(grad, weight)) < weight.nbytes / 8
    assert peak(lambda: ops.linear_backward_weight(x, grad, out=out)) < weight.nbytes / 8


def test_a_gradient_with_gaps_is_refused(implementation, random):
    x, _, _, grad = draw(random, 4, 6, 5)
    out = np.empty((5, 12), np.float32)[:, ::2]
    with pytest.raises(ShapeError, match="view with gaps; it must be C-ordered or Fortran-ordered"):
        ops.linear_backward_weight(x, grad, bias=False, out=(out, None))


def test_slices_of_a_wider_matrix_are_served(implementation, random):
    x, weight, bias, grad = draw(random, 4, 10, 6)
    assert_close(reference.linear(x[:, ::2], weight[:, ::2], bias), ops.linear_forward(x[:, ::2], weight[:, ::2], bias))
    assert_close(grad[:, :3] @ weight[:3], ops.linear_backward_input(grad[:, :3], weight[:3]))
    weight = np.asarray(weight, order="F")
    assert_close(grad[:, :3] @ weight[:3], ops.linear_backward_input(grad[:, :3], weight[:3]))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((2, 3), (4, 5), r"weight is .* \(4, 5\); it must be .* \(4, 3\)"),
        ((2, 3, 1), (4, 3), r"x has shape \(2, 3, 1\); it must be \(N, I\)"),
        ((2, 3), (4,), r"weight has shape \(4,\); it must be \(O, I\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(x, weight, message):
    with pytest.raises(ShapeError, match=message):
        ops.linear_forward(np.zeros(x), np.zeros(weight))


def test_gradients_of_the_wrong_size_are_refused():
    with pytest.raises(ShapeError, match=r"weight is .* \(4, 5\); it must be .* \(3, 5\)"):
        ops.linear_backward_input(np.zeros((2, 3)), np.zeros((4, 5)))
    with pytest.raises(ShapeError, match=r"grad_output is .* \(3, 4\); it must be .* \(2, 4\)"):
        ops.linear_backward_weight(np.zeros((2, 3)), np.zeros((3, 4)))
