"""Activations and sums on each implementation."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.errors import ShapeError
from tests import reference
from tests.checks import assert_close, assert_grad

KINDS = ["relu", "leaky_relu"]
SHAPES = [(1, 1), (3, 5, 7, 2), (13, 29), (2, 300, 257)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient_equal_the_formula(implementation, random, kind, shape):
    x, grad = random.standard_normal((2, *shape)).astype(np.float32)
    x.reshape(-1)[::5] = 0.0
    y = ops.activation_forward(x, kind)
    assert_close(reference.activation(x, kind), y, 1e-6)
    assert_close(reference.activation_gradient(grad, x, kind), ops.activation_backward(grad, y, kind), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_agrees_with_central_differences(random, kind):
    x, grad = random.standard_normal((2, 3, 4))
    x += np.sign(x) * 0.01  # away from the kink
    y = ops.activation_forward(x, kind)
    actual = ops.activation_backward(grad, y, kind)
    assert_grad(lambda x: np.sum(ops.activation_forward(x, kind) * grad), x, actual)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_equals_the_formula(implementation, random, kind, shape):
    a, b = random.standard_normal((2, *shape)).astype(np.float32)
    assert_close(reference.activation(np.float64(a) + b, kind), ops.add_forward(a, b, kind), 1e-6)


def test_inputs_stay_as_they_are(implementation, random):
    a, b = random.standard_normal((2, 3, 4, 5)).astype(np.float32)
    before = a.copy(), b.copy()
    for kind in KINDS:
        ops.activation_forward(a, kind)
        ops.activation_backward(a, b, kind)
        ops.add_forward(a, b, kind)
    np.testing.assert_array_equal(before[0], a)
    np.testing.assert_array_equal(before[1], b)


def test_views_with_gaps_are_served(implementation, random):
    wide = random.standard_normal((4, 6, 8)).astype(np.float32)
    part = wide[:, ::2, 1:6]
    assert_close(np.maximum(part, 0), ops.activation_forward(part, "relu"))
    assert_close(part + part, ops.add_forward(part, part))


def test_what_does_not_fit_is_refused():
    x = np.zeros((2, 3))
    with pytest.raises(ShapeError, match=r"activation \(='gelu'\) is unknown"):
        ops.activation_forward(x, "gelu")
    with pytest.raises(ShapeError, match="kind is None"):
        ops.activation_forward(x, None)
    with pytest.raises(ShapeError, match=r"y is float64 of shape \(2, 3\); it must be float64 of shape \(3, 2\)"):
        ops.activation_backward(x.T, x, "relu")
    with pytest.raises(ShapeError, match=r"add: b is float64 of shape \(2, 4\)"):
        ops.add_forward(x, np.zeros((2, 4)))
    with pytest.raises(ShapeError, match="add: activation"):
        ops.add_forward(x, x, "gelu")
