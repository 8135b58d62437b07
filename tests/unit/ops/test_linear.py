"""Fully connected layers on each implementation, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.errors import ShapeError
from tests import reference
from tests.checks import assert_adjoint, assert_close, assert_grad

SIZES = [(1, 1, 1), (3, 7, 5), (13, 1, 9), (1, 33, 2), (5, 64, 31)]


def draw(random, samples, inputs, outputs, dtype=np.float32):
    """Return x, weight, bias and grad_output."""
    shapes = (samples, inputs), (outputs, inputs), (outputs,), (samples, outputs)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_equals_the_formula(implementation, random, sizes, activation, with_bias):
    x, weight, bias, _ = draw(random, *sizes)
    bias = bias if with_bias else None
    expected = reference.activation(reference.linear(x, weight, bias), activation)
    assert_close(expected, ops.linear_forward(x, weight, bias, activation=activation), 1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_equal_the_formula(implementation, random, sizes):
    x, weight, _, grad = draw(random, *sizes)
    grad_x, grad_weight, grad_bias = reference.linear_gradients(x, weight, grad)
    assert_close(grad_x, ops.linear_backward_input(grad, weight), 1e-5)
    actual = ops.linear_backward_weight(x, grad)
    assert_close(grad_weight, actual[0], 1e-5)
    assert_close(grad_bias, actual[1], 1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_both_gradients_are_adjoint_to_forward(implementation, random, sizes):
    x, weight, _, grad = draw(random, *sizes)
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


def test_out_is_overwritten_and_returned(implementation, random):
    x, weight, bias, grad = draw(random, 5, 7, 3)
    flat = np.full(weight.size + bias.size, np.nan, np.float32)
    out = flat[: weight.size].reshape(weight.shape), flat[weight.size :]
    grad_weight, grad_bias = ops.linear_backward_weight(x, grad, out=out)
    assert grad_weight is out[0]
    assert grad_bias is out[1]
    _, expected_weight, expected_bias = reference.linear_gradients(x, weight, grad)
    assert_close(expected_weight, out[0])
    assert_close(expected_bias, out[1])


def test_slices_of_a_wider_matrix_are_served(implementation, random):
    x, weight, bias, grad = draw(random, 4, 10, 6)
    assert_close(reference.linear(x[:, ::2], weight[:, ::2], bias), ops.linear_forward(x[:, ::2], weight[:, ::2], bias))
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
