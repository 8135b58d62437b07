"""Kernels of activations and sums against the NumPy operators and the formula."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.ops import cpu
from hpcnn.ops.cuda import activation
from tests import reference
from tests.checks import assert_close
from tests.mixed import DTYPES, TOLERANCES, draw, rounded, unaligned

# Fewer than a vector, no multiple of one, and more than the grid's threads hold at once.
SHAPES = [(1,), (7, 3), (2, 3, 5, 8), (33001,)]
KINDS = ["relu", "leaky_relu"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_equal_the_formula(device, random, shape, kind, dtype):
    x, grad = draw(random, shape, dtype), draw(random, shape, dtype)
    x.flat[0] = 0
    y = activation.activation_forward(device.upload(x), kind)
    grad_x = activation.activation_backward(device.upload(grad), y, kind)
    assert y.dtype == grad_x.dtype == dtype
    assert_close(reference.activation(np.float64(x), kind), device.download(y), TOLERANCES[dtype])
    expected = reference.activation_gradient(np.float64(grad), np.float64(x), kind)
    assert_close(expected, device.download(grad_x), TOLERANCES[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("put", [lambda device, x: device.upload(x), unaligned])
def test_float32_has_the_bits_of_numpy_wherever_arrays_begin(device, random, kind, put):
    x, other = draw(random, 1003), draw(random, 1003)
    x[5] = np.nan
    y, z = activation.activation_forward(put(device, x), kind), put(device, other)
    np.testing.assert_array_equal(cpu.activation_forward(x, kind), device.download(y))
    total = activation.add_forward(put(device, x), z, kind)
    np.testing.assert_array_equal(cpu.add_forward(x, other, kind), device.download(total))
    grad = activation.activation_backward(z, y, kind)
    np.testing.assert_array_equal(cpu.activation_backward(other, device.download(y), kind), device.download(grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_sum_is_rounded_once(device, random, kind, dtype):
    a, b = draw(random, (3, 5, 7), dtype), draw(random, (3, 5, 7), dtype)
    y = activation.add_forward(device.upload(a), device.upload(b), kind)
    total = (a.astype(np.float32) + b.astype(np.float32)).astype(np.float64)
    factor = np.where(total > 0, 1.0, reference.SLOPES[kind])
    exact = rounded(rounded(total * factor, np.float32), dtype)
    assert_close(exact, device.download(y), 2e-7 if dtype == np.float32 else 1e-12)


def test_the_public_functions_come_here(on_device, random):
    x = draw(random, (4, 6), DTYPES[1])
    y = ops.activation_forward(on_device.upload(x), "relu")
    np.testing.assert_array_equal(np.maximum(x, 0), on_device.download(y))


def test_nothing_is_launched_for_empty_arrays(device):
    x = device.empty((0, 3), np.float32)
    assert activation.activation_forward(x, "relu").shape == (0, 3)
