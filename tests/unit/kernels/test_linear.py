"""Fully connected layers on CUDA kernels that use no tensor cores, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.ops.cuda import linear, products, tuning, types
from tests import reference

SHAPES = [(1, 1, 1), (3, 20, 10), (2, 5, 33), (70, 130, 68), (5, 400, 8)]
"""(N, I, O)."""


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """Let nothing be measured, and nothing be remembered from or for other tests."""
    monkeypatch.setenv(tuning.VARIABLE, "off")
    products.forget()
    yield
    products.forget()


def assert_close(device, got, expected, tolerance):
    got = np.float64(device.download(got).astype(np.float32))
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def upload(device, matrix, order):
    """Return a matrix on the device in one memory order or the other."""
    return device.upload(matrix) if order == "C" else device.upload(np.ascontiguousarray(matrix.T)).T


@pytest.mark.parametrize("name", ["f32", "bf16"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", ["naive", "simt"])
def test_all_passes_follow_their_formulas(device, random, kernel, shape, order, name):
    dtype = np.dtype(np.float32) if name == "f32" else types.bfloat16()
    count, inputs, outputs = shape
    x, grad = (random.standard_normal((count, width)).astype(dtype) for width in (inputs, outputs))
    weight, bias = (random.standard_normal(s).astype(np.float32) for s in ((outputs, inputs), (outputs,)))
    exact = [a.astype(dtype).astype(np.float64) for a in (x, weight, grad)]
    on_device = device.upload(x), upload(device, weight, order), device.upload(bias), device.upload(grad)
    out = upload(device, np.full((outputs, inputs), np.nan, np.float32), order), device.empty((outputs,), np.float32)
    with products.force(kernel):
        y = linear.linear_forward(*on_device[:3], activation="relu")
        grad_x = linear.linear_backward_input(on_device[3], on_device[1])
        linear.linear_backward_weight(on_device[0], on_device[3], out=out)
        fresh, nothing = linear.linear_backward_weight(on_device[0], on_device[3], bias=False)
    assert (y.dtype, grad_x.dtype, fresh.dtype, nothing) == (dtype, dtype, np.float32, None)
    expected = reference.linear_gradients(*exact)
    tolerance = 1e-6 if name == "f32" else 4e-3
    assert_close(device, y, reference.activation(reference.linear(*exact[:2], bias), "relu"), tolerance)
    assert_close(device, grad_x, expected[0], tolerance)
    for got, wanted in ((out[0], expected[1]), (fresh, expected[1]), (out[1], expected[2])):
        assert_close(device, got, wanted, 1e-6)


def test_weights_are_taken_as_they_lie(device, random, monkeypatch):
    """Neither order is copied: kernels get the memory of the weight itself."""
    x = device.upload(random.standard_normal((2, 3)), np.float32)
    seen = []
    monkeypatch.setattr(products, "run", lambda problem, *operands: seen.append((problem.kind, operands[1])))
    for order in ("C", "F"):
        weight = upload(device, random.standard_normal((4, 3)).astype(np.float32), order)
        linear.linear_forward(x, weight)
        kind, taken = seen.pop()
        assert kind == {"C": "forward", "F": "input"}[order]
        assert taken.base is weight or taken.base is weight.base
