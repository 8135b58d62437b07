"""2-D convolution and its gradients, on each implementation, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hpcnn import ops
from hpcnn.errors import ShapeError
from hpcnn.ops import backend
from hpcnn.ops.cpu import conv2d as numpy_conv2d
from tests import reference
from tests.checks import assert_adjoint, assert_close, assert_grad

# x shape, filters, kernel size, geometry
CASES = {
    "plain 3x3": ((2, 7, 5, 3), 4, (3, 3), {"padding": ((1, 1), (1, 1))}),
    "no padding": ((1, 5, 6, 2), 3, (3, 2), {}),
    "1x1": ((3, 4, 5, 7), 5, (1, 1), {}),
    "1x1 of a single pixel": ((3, 1, 1, 7), 5, (1, 1), {}),
    "1x1 with stride": ((2, 7, 6, 3), 5, (1, 1), {"stride": (2, 3)}),
    "1x1 with padding": ((2, 3, 3, 2), 3, (1, 1), {"padding": ((1, 0), (2, 1))}),
    "stride 2": ((2, 9, 8, 3), 4, (3, 3), {"stride": (2, 2), "padding": ((1, 1), (1, 1))}),
    "stride beyond the kernel": ((1, 11, 10, 2), 3, (2, 2), {"stride": (3, 4)}),
    "stride that leaves pixels over": ((1, 8, 9, 2), 3, (3, 3), {"stride": (3, 4)}),
    "four different sides": ((2, 6, 7, 3), 4, (3, 4), {"padding": ((0, 2), (3, 1))}),
    "one-sided halo": ((2, 5, 6, 3), 4, (3, 3), {"padding": ((1, 0), (1, 1))}),
    "dilation": ((1, 9, 8, 2), 3, (3, 2), {"dilation": (2, 3), "padding": ((2, 1), (0, 3))}),
    "dilation and stride": (
        (2, 9, 10, 2),
        3,
        (3, 3),
        {"dilation": (2, 1), "stride": (2, 2), "padding": ((2, 2), (1, 1))},
    ),
    "two groups": ((2, 6, 5, 4), 6, (3, 3), {"groups": 2, "padding": ((1, 1), (1, 1))}),
    "1x1 in groups": ((2, 4, 3, 6), 9, (1, 1), {"groups": 3}),
    "a group each channel": ((2, 6, 6, 5), 5, (3, 3), {"groups": 5, "stride": (2, 2), "padding": ((1, 1), (1, 1))}),
    "first AlexNet filter": ((1, 31, 27, 3), 5, (11, 11), {"stride": (4, 4), "padding": ((2, 2), (2, 2))}),
    "padding beyond the kernel": ((1, 3, 2, 2), 3, (2, 2), {"padding": ((3, 4), (2, 5))}),
    "padding beyond the kernel with stride": ((1, 3, 2, 2), 3, (2, 2), {"padding": ((3, 4), (4, 5)), "stride": (2, 2)}),
    "window as large as the image": ((2, 4, 3, 3), 6, (4, 3), {}),
    "more filters than pixels": ((1, 3, 3, 8), 40, (3, 3), {"padding": ((1, 1), (1, 1))}),
}

case = pytest.mark.parametrize(("shape", "filters", "kernel_size", "geometry"), CASES.values(), ids=CASES.keys())


def draw(random, shape, filters, kernel_size, geometry, dtype=np.float32):
    """Return x, weight, bias and grad_output of fitting shapes."""
    depth = shape[3] // geometry.get("groups", 1)
    sizes = {name: value for name, value in geometry.items() if name != "groups"}
    output = (shape[0], *reference.output_size(shape[1:3], kernel_size, **sizes), filters)
    shapes = shape, (filters, *kernel_size, depth), (filters,), output
    return [random.standard_normal(extents).astype(dtype) for extents in shapes]


@case
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_forward_equals_the_formula(implementation, random, shape, filters, kernel_size, geometry, activation):
    x, weight, bias, _ = draw(random, shape, filters, kernel_size, geometry)
    expected = reference.activation(reference.conv2d(x, weight, bias, **geometry), activation)
    y = ops.conv2d_forward(x, weight, bias, activation=activation, **geometry)
    assert y.dtype == np.float32
    assert_close(expected, y, 1e-5)


@case
def test_gradients_equal_the_formula(implementation, random, shape, filters, kernel_size, geometry):
    x, weight, _, grad = draw(random, shape, filters, kernel_size, geometry)
    grad_x, grad_weight, grad_bias = reference.conv2d_gradients(x, weight, grad, **geometry)
    assert_close(grad_x, ops.conv2d_backward_input(grad, weight, shape[1:3], **geometry), 1e-5, "grad_input")
    actual = ops.conv2d_backward_weight(x, grad, kernel_size, **geometry)
    assert_close(grad_weight, actual[0], 1e-5, "grad_weight")
    assert_close(grad_bias, actual[1], 1e-5, "grad_bias")


@case
def test_backward_input_and_backward_weight_are_adjoint_to_forward(
    implementation, random, shape, filters, kernel_size, geometry
):
    x, weight, _, grad = draw(random, shape, filters, kernel_size, geometry)
    y = ops.conv2d_forward(x, weight, **geometry)
    assert_adjoint(y, grad, x, ops.conv2d_backward_input(grad, weight, shape[1:3], **geometry))
    grad_weight, _ = ops.conv2d_backward_weight(x, grad, kernel_size, bias=False, **geometry)
    assert_adjoint(y, grad, weight, grad_weight)


@pytest.mark.parametrize("name", ["dilation and stride", "four different sides", "two groups"])
def test_gradients_agree_with_central_differences(random, name):
    shape, filters, kernel_size, geometry = CASES[name]
    shape = (1, *shape[1:])
    x, weight, bias, grad = draw(random, shape, filters, kernel_size, geometry, np.float64)
    assert_grad(
        lambda x: np.sum(ops.conv2d_forward(x, weight, bias, **geometry) * grad),
        x,
        ops.conv2d_backward_input(grad, weight, shape[1:3], **geometry),
    )
    grad_weight, grad_bias = ops.conv2d_backward_weight(x, grad, kernel_size, **geometry)
    assert_grad(lambda w: np.sum(ops.conv2d_forward(x, w, bias, **geometry) * grad), weight, grad_weight)
    assert_grad(lambda b: np.sum(ops.conv2d_forward(x, weight, b, **geometry) * grad), bias, grad_bias)


@st.composite
def convolutions(draw):
    """Shapes and geometry of a small convolution that fits."""
    small, side = st.integers(1, 3), st.integers(0, 4)
    groups = draw(small)
    geometry = {
        "stride": (draw(small), draw(small)),
        "padding": ((draw(side), draw(side)), (draw(side), draw(side))),
        "dilation": (draw(small), draw(small)),
        "groups": groups,
    }
    kernel_size = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    shape = (draw(small), draw(st.integers(1, 7)), draw(st.integers(1, 7)), groups * draw(small))
    sizes = {name: value for name, value in geometry.items() if name != "groups"}
    assume(0 not in reference.output_size(shape[1:3], kernel_size, **sizes))
    return shape, groups * draw(small), kernel_size, geometry


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(convolutions())
def test_any_small_convolution_equals_the_formula(implementation, convolution):
    shape, _, kernel_size, geometry = convolution
    x, weight, bias, grad = draw(np.random.default_rng(1), *convolution)
    assert_close(reference.conv2d(x, weight, bias, **geometry), ops.conv2d_forward(x, weight, bias, **geometry), 2e-5)
    grad_x, grad_weight, grad_bias = reference.conv2d_gradients(x, weight, grad, **geometry)
    assert_close(grad_x, ops.conv2d_backward_input(grad, weight, shape[1:3], **geometry), 2e-5)
    actual = ops.conv2d_backward_weight(x, grad, kernel_size, **geometry)
    assert_close(grad_weight, actual[0], 2e-5)
    assert_close(grad_bias, actual[1], 2e-5)


@pytest.mark.parametrize("column_bytes", [1, 2000, 20000])
@pytest.mark.parametrize("name", ["plain 3x3", "stride 2", "two groups", "dilation", "1x1 with stride"])
def test_blocks_of_the_column_buffer_do_not_show(random, monkeypatch, name, column_bytes):
    shape, filters, kernel_size, geometry = CASES[name]
    shape = (5, *shape[1:])
    x, weight, bias, grad = draw(random, shape, filters, kernel_size, geometry, np.float64)

    def run():
        y = ops.conv2d_forward(x, weight, bias, activation="relu", **geometry)
        grad_x = ops.conv2d_backward_input(grad, weight, shape[1:3], **geometry)
        return y, grad_x, *ops.conv2d_backward_weight(x, grad, kernel_size, **geometry)

    expected = run()
    monkeypatch.setattr(numpy_conv2d, "COLUMN_BYTES", column_bytes)
    for whole, blocked in zip(expected, run(), strict=True):
        assert_close(whole, blocked, 1e-13)


def test_both_formulations_of_the_input_gradient_agree(random):
    for shape, filters, kernel_size, geometry in CASES.values():
        if geometry.get("stride", (1, 1)) != (1, 1):
            continue
        _, weight, _, grad = draw(random, shape, filters, kernel_size, geometry, np.float64)
        padding, dilation = geometry.get("padding", ((0, 0), (0, 0))), geometry.get("dilation", (1, 1))
        groups = geometry.get("groups", 1)
        turned = numpy_conv2d._convolve_back(grad, weight, padding, dilation, groups)
        scattered = numpy_conv2d._scatter_back(grad, weight, shape[1:3], (1, 1), padding, dilation, groups)
        assert_close(scattered, turned, 1e-13)


def test_out_is_overwritten_and_returned(implementation, random):
    shape, filters, kernel_size, geometry = CASES["plain 3x3"]
    x, weight, bias, grad = draw(random, shape, filters, kernel_size, geometry)
    flat = np.full(weight.size + bias.size + 3, 7.0, np.float32)
    out = flat[1 : 1 + weight.size].reshape(weight.shape), flat[-1 - bias.size : -1]
    result = ops.conv2d_backward_weight(x, grad, kernel_size, out=out, **geometry)
    assert result[0] is out[0]
    assert result[1] is out[1]
    _, expected_weight, expected_bias = reference.conv2d_gradients(x, weight, grad, **geometry)
    assert_close(expected_weight, out[0])
    assert_close(expected_bias, out[1])
    assert [7.0] * 3 == [flat[0], flat[1 + weight.size], flat[-1]]


def test_bias_gradient_is_left_out_when_not_wanted(implementation, random):
    x, weight, _, grad = draw(random, *CASES["plain 3x3"])
    out = np.empty_like(weight), None
    padding = CASES["plain 3x3"][3]["padding"]
    grad_weight, grad_bias = ops.conv2d_backward_weight(x, grad, (3, 3), padding=padding, bias=False, out=out)
    assert grad_bias is None
    assert grad_weight is out[0]


def test_bias_gradient_of_many_positions_keeps_its_digits(implementation):
    grad = np.full((1, 1024, 1024, 1), 1 / 3, np.float32)
    x = np.zeros((1, 1024, 1024, 1), np.float32)
    _, grad_bias = ops.conv2d_backward_weight(x, grad, (1, 1))
    # oneDNN adds them up one by one in float32; a million equal numbers are its worst case.
    assert_close([float(np.float32(1 / 3)) * 2**20], grad_bias, {"numpy": 1e-6, "onednn": 5e-3}[implementation])


def test_inputs_stay_as_they_are_and_views_are_served(implementation, random):
    shape, filters, kernel_size, geometry = CASES["plain 3x3"]
    x, weight, bias, grad = draw(random, shape, filters, kernel_size, geometry)
    wide = np.repeat(x, 2, axis=2)
    before = [array.copy() for array in (wide, weight, bias, grad)]
    y = ops.conv2d_forward(wide[:, :, ::2], weight, bias, activation="relu", **geometry)
    assert_close(ops.conv2d_forward(x, weight, bias, activation="relu", **geometry), y, 1e-6)
    ops.conv2d_backward_input(grad, weight, shape[1:3], **geometry)
    ops.conv2d_backward_weight(wide[:, :, ::2], grad, kernel_size, **geometry)
    for kept, array in zip(before, (wide, weight, bias, grad), strict=True):
        np.testing.assert_array_equal(kept, array)


def test_one_number_stands_for_rows_and_columns(random):
    x, weight = random.standard_normal((1, 8, 8, 2)), random.standard_normal((3, 3, 3, 2))
    short = ops.conv2d_forward(x, weight, stride=2, padding=1, dilation=2)
    full = ops.conv2d_forward(x, weight, stride=(2, 2), padding=((1, 1), (1, 1)), dilation=(2, 2))
    np.testing.assert_array_equal(full, short)


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        ((1, 5, 5, 3), (4, 3, 3, 1), {"groups": 2}, r"in_channels \(=3\) and .* must be divisible by groups \(=2\)"),
        ((1, 5, 5, 4), (3, 3, 3, 2), {"groups": 2}, r"out_channels \(=3\) must be divisible by groups \(=2\)"),
        ((1, 5, 5, 4), (3, 3, 3, 4), {"groups": 0}, r"groups \(=0\)"),
        ((1, 5, 5, 3), (4, 3, 3, 2), {}, r"weight is .* \(4, 3, 3, 2\); it must be .* \(4, 3, 3, 3\)"),
        ((1, 2, 5, 3), (4, 3, 3, 3), {}, r"H \(=2\) .* smaller than the window \(=3\)"),
        ((1, 5, 5, 3), (4, 3, 3, 3), {"dilation": 3}, r"smaller than the window \(=7\)"),
        ((1, 5, 5, 3), (4, 3, 3, 3), {"stride": 0}, r"stride \(=0\) .* must be at least 1"),
        ((1, 5, 5, 3), (4, 3, 3, 3), {"padding": -1}, r"padding \(=-1, -1\) at least 0"),
        ((5, 5, 3), (4, 3, 3, 3), {}, r"x has shape \(5, 5, 3\); it must be \(N, H, W, C\)"),
        ((0, 5, 5, 3), (4, 3, 3, 3), {}, "every extent at least 1"),
        ((1, 5, 5, 3), (4, 3, 3, 3), {"activation": "tanh"}, r"activation \(='tanh'\) is unknown"),
        ((1, 5, 5, 3), (4, 3, 3, 3), {"bias": np.zeros(5)}, r"bias is float64 of shape \(5,\); .* shape \(4,\)"),
        ((1, 5, 5, 3), (4, 3, 3, 3), {"bias": np.zeros(4, np.float32)}, "bias is float32"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(x, weight, options, message):
    with pytest.raises(ShapeError, match=message):
        ops.conv2d_forward(np.zeros(x), np.zeros(weight), **options)


def test_gradients_of_the_wrong_size_are_refused():
    x, weight, grad = np.zeros((1, 5, 5, 3)), np.zeros((4, 3, 3, 3)), np.zeros((1, 4, 3, 4))
    with pytest.raises(ShapeError, match=r"grad_output is .* \(1, 4, 3, 4\); it must be .* \(1, 3, 3, 4\)"):
        ops.conv2d_backward_input(grad, weight, (5, 5))
    with pytest.raises(ShapeError, match=r"grad_output is .* \(1, 4, 3, 4\); it must be .* \(1, 3, 3, 4\)"):
        ops.conv2d_backward_weight(x, grad, (3, 3))


def test_an_out_that_does_not_fit_is_refused():
    x, grad = np.zeros((1, 5, 5, 3)), np.zeros((1, 3, 3, 4))
    with pytest.raises(ShapeError, match=r"out is .* \(4, 3, 3, 2\); it must be .* \(4, 3, 3, 3\)"):
        ops.conv2d_backward_weight(x, grad, (3, 3), out=(np.zeros((4, 3, 3, 2)), np.zeros(4)))
    with pytest.raises(ShapeError, match=r"out lacks the array of shape \(4,\)"):
        ops.conv2d_backward_weight(x, grad, (3, 3), out=(np.zeros((4, 3, 3, 3)), None))
    with pytest.raises(ShapeError, match="C-ordered"):
        ops.conv2d_backward_weight(x, grad, (3, 3), out=(np.zeros((3, 3, 3, 4)).T, np.zeros(4)))


def test_large_images_keep_the_column_buffer_small(random):
    x, weight = random.standard_normal((1, 64, 1024, 8), np.float32), random.standard_normal((2, 3, 3, 8), np.float32)
    with backend.use("numpy"):
        parts = [part.columns.nbytes for part in numpy_conv2d._parts(x, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)]
        y = ops.conv2d_forward(x, weight, padding=1)
    assert len(parts) > 1
    assert max(parts) <= numpy_conv2d.COLUMN_BYTES
    corner = reference.conv2d(x[:, -4:, -4:], weight, padding=((0, 1), (0, 1)))
    assert_close(corner, y[:, -3:, -3:], 1e-5)
