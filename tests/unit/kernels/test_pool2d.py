"""Kernels of pooling: argmax as the NumPy operators have it, numbers as the loops in float64 do."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from hpcnn.errors import ShapeError
from hpcnn.geometry import output_size
from hpcnn.ops import cpu
from hpcnn.ops.cuda import pool2d
from tests import reference
from tests.checks import assert_close
from tests.mixed import BFLOAT16, DTYPES, TOLERANCES, draw

# shape, window, stride, padding
CASES = [
    ((2, 6, 8, 8), (2, 2), (2, 2), ((0, 0), (0, 0))),
    ((2, 7, 9, 16), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((1, 5, 4, 3), (3, 2), (1, 1), ((2, 0), (0, 1))),
    ((3, 8, 7, 5), (2, 3), (3, 4), ((0, 1), (1, 0))),
    ((1, 4, 300, 1), (1, 7), (1, 2), ((0, 0), (3, 3))),
    ((1, 18, 17, 8), (17, 16), (1, 1), ((0, 0), (0, 0))),
]
SEVERAL = [CASES[1], CASES[2], CASES[5]]


def ties(random, shape, dtype):
    """Return few distinct numbers, so that maxima are not unique, with a NaN and infinities."""
    x = random.integers(-3, 3, shape).astype(dtype)
    x.flat[random.integers(x.size, size=4)] = np.array([np.nan, -np.inf, np.inf, -np.inf], dtype)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "window", "stride", "padding"), CASES)
def test_maximum_has_the_bits_of_numpy(device, random, shape, window, stride, padding, dtype):
    options = {"stride": stride, "padding": padding}
    x = ties(random, shape, dtype)
    y, argmax = pool2d.maxpool2d_forward(device.upload(x), window, **options)
    with np.errstate(invalid="ignore"):
        expected, place = cpu.maxpool2d_forward(x.astype(np.float32), window, **options)
    assert y.dtype == dtype
    assert argmax.dtype == (np.uint8 if prod(window) <= 255 else np.int32)
    np.testing.assert_array_equal(expected, device.download(y).astype(np.float32))
    np.testing.assert_array_equal(place, device.download(argmax))

    grad = draw(random, y.shape, dtype)
    grad_x = device.download(pool2d.maxpool2d_backward(device.upload(grad), argmax, shape[1:3], window, **options))
    wide = cpu.maxpool2d_backward(grad.astype(np.float32), place, shape[1:3], window, **options)
    assert grad_x.dtype == dtype
    np.testing.assert_array_equal(wide.astype(dtype), grad_x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "window", "stride", "padding"), SEVERAL)
def test_maximum_equals_the_loops(device, random, shape, window, stride, padding, dtype):
    x = draw(random, shape, dtype)
    y, argmax = pool2d.maxpool2d_forward(device.upload(x), window, stride=stride, padding=padding)
    expected, place = reference.maxpool2d(x, window, stride, padding)
    np.testing.assert_array_equal(expected, np.float64(device.download(y)))
    np.testing.assert_array_equal(place, device.download(argmax))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "window", "stride", "padding"), CASES)
def test_average_equals_the_loops(device, random, shape, window, stride, padding, dtype):
    options = {"stride": stride, "padding": padding}
    x = draw(random, shape, dtype)
    grad = draw(random, (shape[0], *output_size(shape[1:3], window, stride, padding), shape[3]), dtype)
    y = pool2d.avgpool2d_forward(device.upload(x), window, **options)
    grad_x = pool2d.avgpool2d_backward(device.upload(grad), shape[1:3], window, **options)
    assert y.dtype == grad_x.dtype == dtype
    assert_close(reference.avgpool2d(x, window, stride, padding), device.download(y), 2 * TOLERANCES[dtype])
    expected = reference.avgpool2d_gradient(grad, shape[1:3], window, stride, padding)
    assert_close(expected, device.download(grad_x), 2 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 7, 64), (3, 5, 2, 3), (1, 1, 1, 1), (2, 3, 3, 1032)])
def test_global_average_is_the_mean(device, random, shape, dtype):
    x, grad = draw(random, shape, dtype), draw(random, (shape[0], shape[3]), dtype)
    y = pool2d.global_avgpool_forward(device.upload(x))
    assert_close(np.float64(x).mean(axis=(1, 2)), device.download(y), TOLERANCES[dtype])
    grad_x = pool2d.global_avgpool_backward(device.upload(grad), shape[1:3])
    expected = np.broadcast_to(np.float64(grad)[:, None, None] / (shape[1] * shape[2]), shape)
    assert_close(expected, device.download(grad_x), TOLERANCES[dtype])


def test_channels_that_begin_anywhere(device, random):
    x = draw(random, (2, 6, 6, 8), BFLOAT16)
    room = device.upload(np.concatenate([x.ravel()[:1], x.ravel()]))
    y, _ = pool2d.maxpool2d_forward(room[1:].reshape(x.shape), (2, 2), stride=(2, 2), padding=((0, 0), (0, 0)))
    expected = reference.maxpool2d(x, (2, 2), (2, 2))[0]
    np.testing.assert_array_equal(expected, np.float64(device.download(y)))


def test_more_rows_than_kernels_count_are_refused(device):
    with pytest.raises(ShapeError, match="too many rows"):
        pool2d._launch("avgpool2d_forward", 1, (2**20, 2**11, 1, 1), ())
