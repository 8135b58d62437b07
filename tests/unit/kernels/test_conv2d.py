"""Convolutions on CUDA kernels that use no tensor cores, against loops in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from hpcnn.ops.cuda import columns, conv2d, filters, products, simt, tuning, types
from hpcnn.ops.cuda.products import Geometry, Problem
from tests import reference

NONE = ((0, 0), (0, 0))


class Case(NamedTuple):
    """A convolution."""

    x: tuple[int, int, int, int]
    filters: tuple[int, int, int]  # (K, R, S)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = NONE
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def size(self):
        return reference.output_size(self.x[1:3], self.filters[1:], self.stride, self.padding, self.dilation)

    def arrays(self, random):
        """Return x, weight, bias and grad_output."""
        weight = (*self.filters, self.x[3] // self.groups)
        y = (self.x[0], *self.size, self.filters[0])
        return [random.standard_normal(shape).astype(np.float32) for shape in (self.x, weight, weight[:1], y)]

    def problem(self, kind, compute="fp32"):
        offsets = self.padding[0][0], self.padding[1][0]
        numbers = (*self.x, *self.filters, *self.size, *self.stride, *offsets, *self.dilation, self.groups)
        return Problem(kind, compute, Geometry._make(numbers))


CASES = [
    Case((2, 5, 6, 3), (5, 3, 3), padding=((1, 1), (1, 1))),
    Case((1, 1, 1, 1), (1, 1, 1)),
    Case((3, 4, 7, 8), (16, 1, 1)),
    Case((2, 5, 5, 16), (8, 1, 1), stride=(2, 2)),
    Case((1, 9, 8, 4), (8, 3, 2), stride=(2, 3), padding=((0, 1), (2, 1))),
    Case((2, 7, 9, 8), (20, 3, 3), stride=(3, 2), padding=((1, 0), (0, 2)), dilation=(2, 1)),
    Case((1, 13, 11, 3), (4, 7, 7), stride=(2, 2), padding=((3, 3), (3, 3))),
    Case((1, 10, 9, 5), (3, 2, 5), stride=(1, 3), padding=((0, 2), (4, 0)), dilation=(3, 2)),
    Case((1, 9, 9, 4), (4, 3, 3), stride=(2, 4), padding=((2, 2), (4, 4)), dilation=(2, 2)),
    Case((2, 3, 2, 20), (12, 5, 4), padding=((4, 3), (5, 1))),
    Case((2, 6, 5, 8), (12, 3, 3), padding=((1, 1), (1, 1)), groups=2),
    Case((1, 6, 6, 6), (6, 3, 3), stride=(2, 2), padding=((1, 1), (0, 1)), groups=6),
    Case((2, 4, 4, 6), (9, 2, 2), groups=3),
]

# Relative error in the norm: sums of a few hundred float32 products; bf16 outputs are rounded to 8 bits, and with 8-bit
# weights too the products are exact in float32.
TOLERANCE = {"f32": 1e-6, "bf16": 4e-3, "bf16 to f32": 1e-6}


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """Let nothing be measured, and nothing be remembered from or for other tests."""
    monkeypatch.setenv(tuning.VARIABLE, "off")
    products.forget()
    yield
    products.forget()


def rounded(x, dtype):
    return x.astype(dtype).astype(np.float64)


def assert_close(device, got, expected, kind):
    got = np.float64(device.download(got).astype(np.float32))
    assert got.shape == expected.shape
    scale = np.linalg.norm(expected)
    assert np.linalg.norm(got - expected) <= TOLERANCE[kind] * scale
    assert np.abs(got - expected).max(initial=0.0) <= 8 * TOLERANCE[kind] * max(np.abs(expected).max(), 1e-3 * scale)


def element_type(name):
    return np.dtype(np.float32) if name == "f32" else types.bfloat16()


@pytest.mark.parametrize("name", ["f32", "bf16"])
@pytest.mark.parametrize("kernel", ["naive", "simt"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_passes_follow_their_formulas(device, random, case, kernel, name):
    dtype = element_type(name)
    x, weight, bias, grad = case.arrays(random)
    x, grad = x.astype(dtype), grad.astype(dtype)
    args = [device.upload(array) for array in (x, weight, bias, grad)]
    exact = rounded(x, dtype), rounded(weight, dtype)
    with products.force(kernel):
        y = conv2d.conv2d_forward(*args[:3], **case.geometry, activation="leaky_relu")
        grad_x = conv2d.conv2d_backward_input(args[3], args[1], case.x[1:3], **case.geometry)
        grad_w, grad_b = conv2d.conv2d_backward_weight(args[0], args[3], case.filters[1:], **case.geometry)
    assert (y.dtype, grad_x.dtype, grad_w.dtype, grad_b.dtype) == (dtype, dtype, np.float32, np.float32)
    expected = reference.conv2d_gradients(*exact, rounded(grad, dtype), **case.geometry)
    assert_close(device, y, reference.activation(reference.conv2d(*exact, bias, **case.geometry), "leaky_relu"), name)
    assert_close(device, grad_x, expected[0], name)
    for got, wanted in zip((grad_w, grad_b), expected[1:], strict=True):
        assert_close(device, got, wanted, "f32" if name == "f32" else "bf16 to f32")


LARGER = Case((2, 9, 8, 24), (140, 3, 3), stride=(2, 1), padding=((1, 1), (1, 1)))
"""More rows, columns and depth than one tile of every kernel has."""


@pytest.mark.parametrize("least_depth", [8, 1000])
@pytest.mark.parametrize("tile", ["128x128", "128x64", "64x64"])
def test_every_tile_and_cut_of_the_depth(device, random, monkeypatch, tile, least_depth):
    monkeypatch.setattr(simt, "LEAST_DEPTH", least_depth)
    monkeypatch.setattr(device, "num_processors", 40)
    x, weight, bias, grad = LARGER.arrays(random)
    dx, dw, db, dg = (device.upload(array) for array in (x, weight, bias, grad))
    expected = reference.conv2d_gradients(x, weight, grad, **LARGER.geometry)
    offered = {
        kind: next(c for c in simt.candidates(LARGER.problem(kind)) if c.name == f"simt {tile}")
        for kind in ("forward", "input", "weight")
    }
    y, grad_x, grad_w = (device.empty(array.shape, np.float32) for array in (grad, x, weight))
    offered["forward"].run(dx, dw, db, y, "relu")
    assert_close(device, y, reference.activation(reference.conv2d(x, weight, bias, **LARGER.geometry), "relu"), "f32")
    offered["input"].run(dg, dw, None, grad_x, None)
    assert_close(device, grad_x, expected[0], "f32")
    offered["weight"].run(dx, dg, grad_w)
    assert_close(device, grad_w, expected[1], "f32")


@pytest.mark.parametrize("kernel", ["naive", "simt"])
def test_weights_and_gradients_may_lie_anywhere_in_a_flat_vector(device, random, kernel):
    case = CASES[2]
    x, weight, bias, grad = case.arrays(random)
    flat = device.upload(np.concatenate([[np.nan], weight.ravel(), [np.nan]]), np.float32)
    target = device.upload(np.full(weight.size + 2, np.nan, np.float32))
    lying, out = (vector[1:-1].reshape(weight.shape) for vector in (flat, target))
    dx, db, dg = (device.upload(array) for array in (x, bias, grad))
    with products.force(kernel):
        y = conv2d.conv2d_forward(dx, lying, db, **case.geometry)
        grad_x = conv2d.conv2d_backward_input(dg, lying, case.x[1:3], **case.geometry)
        got, _ = conv2d.conv2d_backward_weight(dx, dg, (1, 1), **case.geometry, bias=False, out=(out, None))
    expected = reference.conv2d_gradients(x, weight, grad, **case.geometry)
    assert_close(device, y, reference.conv2d(x, weight, bias, **case.geometry), "f32")
    assert_close(device, grad_x, expected[0], "f32")
    assert got is out
    assert_close(device, out, expected[1], "f32")
    ends = device.download(target)[[0, -1]]
    assert np.isnan(ends).all()


def test_bias_gradient_is_put_where_it_is_wanted(device, random):
    case = CASES[0]
    x, weight, bias, grad = case.arrays(random)
    out = device.empty(weight.shape, np.float32), device.empty(bias.shape, np.float32)
    arrays = device.upload(x), device.upload(grad)
    got = conv2d.conv2d_backward_weight(*arrays, case.filters[1:], **case.geometry, out=out)
    assert all(a is b for a, b in zip(got, out))
    assert_close(device, out[1], np.float64(grad).sum((0, 1, 2)), "f32")


@pytest.mark.parametrize("name", ["f32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (1000, 5), (517, 70)], ids=str)
def test_column_sums(device, random, shape, name):
    x = random.standard_normal(shape).astype(element_type(name))
    assert_close(device, columns.column_sums(device.upload(x)), np.float64(x.astype(np.float32)).sum(0), "f32")


@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_partial_sums_are_added_before_bias_and_activation(device, random, name):
    partials, bias = random.standard_normal((5, 3, 7)).astype(np.float32), random.standard_normal(7).astype(np.float32)
    out = device.empty((3, 7), element_type(name))
    columns.reduce_partials(device.upload(partials), 5, out, device.upload(bias), "relu")
    assert_close(device, out, reference.activation(np.float64(partials).sum(0) + bias, "relu"), name)


def bits(compute, x):
    """Return x rounded, to nearest: tf32 keeps 10 bits of mantissa, ties away from zero."""
    if compute == "tf32":
        return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return x if compute == "fp32" else x.astype(types.bfloat16())


@pytest.mark.parametrize("compute", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(("shape", "groups"), [((5, 3, 2, 7), 1), ((40, 1, 1, 33), 1), ((6, 2, 2, 4), 2)], ids=str)
def test_filters_are_rounded_padded_and_turned_round(device, random, compute, shape, groups):
    weight = random.standard_normal(shape).astype(np.float32)
    on_device = device.upload(weight)
    plain = device.download(filters.converted(on_device, compute, False, align=8))
    rest = -shape[3] % 8
    np.testing.assert_array_equal(plain, np.pad(bits(compute, weight), [(0, 0)] * 3 + [(0, rest)]))
    turned = device.download(filters.converted(on_device, compute, True, align=4, groups=groups))
    count = shape[0] // groups
    expected = weight.reshape(groups, count, *shape[1:])[:, :, ::-1, ::-1].transpose(0, 4, 2, 3, 1)
    expected = np.pad(expected, [(0, 0)] * 4 + [(0, -count % 4)]).reshape(groups * shape[3], *shape[1:3], -1)
    np.testing.assert_array_equal(turned, bits(compute, np.ascontiguousarray(expected)))


def test_filters_that_need_nothing_are_not_copied(device, random):
    weight = device.upload(random.standard_normal((3, 1, 1, 8)), np.float32)
    assert filters.converted(weight, "fp32", False, align=4) is weight


def test_turned_filters_make_an_input_gradient_a_convolution(device, random):
    case = Case((1, 6, 5, 4), (3, 3, 2))
    _, weight, _, grad = case.arrays(random)
    on_device = device.upload(weight), device.upload(grad)
    expected = conv2d.conv2d_backward_input(on_device[1], on_device[0], (6, 5), **case.geometry)
    turned = filters.converted(on_device[0], "fp32", True)
    got = conv2d.conv2d_forward(on_device[1], turned, **{**case.geometry, "padding": ((2, 2), (1, 1))})
    assert_close(device, got, np.float64(device.download(expected)), "f32")


def test_a_forced_candidate_must_exist(device, random):
    x, weight, *_ = CASES[1].arrays(random)
    with products.force("nobody"), pytest.raises(LookupError, match="nobody"):
        conv2d.conv2d_forward(device.upload(x), device.upload(weight), **CASES[1].geometry)


def test_the_fastest_candidate_is_measured_once(device, monkeypatch):
    problem, ran = CASES[2].problem("forward"), []
    offered = [products.Candidate(name, lambda name=name: ran.append(name)) for name in ("fast", "slow", "naive")]
    monkeypatch.setattr(products, "candidates", lambda _: offered)
    monkeypatch.setattr(device, "measure", lambda run: run() or len(ran))
    monkeypatch.setattr(tuning, "fastest", lambda key, names, measure: (key, names, min(names, key=measure))[2])
    products.run(problem)
    assert ran == ["fast", "slow", "fast"]  # "naive" is not worth measuring where there is another
    products.run(problem)
    assert ran[3:] == ["fast"]


@pytest.mark.parametrize("kind", ["forward", "input", "weight"])
def test_extents_of_a_product_multiply_to_its_flops(kind):
    problem = Case((2, 6, 5, 8), (12, 3, 3), padding=((1, 1), (1, 1)), groups=2).problem(kind)
    assert 2 * 2 * np.prod(problem.gemm) == problem.flops
