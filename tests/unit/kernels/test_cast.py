"""Changes of element type round as ml_dtypes does, on the device and on the host."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.errors import ShapeError
from hpcnn.ops.cuda import cast
from tests.mixed import BFLOAT16, draw, unaligned


@pytest.mark.parametrize("count", [1, 4, 1027])
@pytest.mark.parametrize("put", [lambda device, x: device.upload(x), unaligned])
def test_floats_round_to_the_nearest(device, random, count, put):
    x = draw(random, count) * np.float32(10.0) ** random.integers(-20, 20, count).astype(np.float32)
    narrow = cast.cast(put(device, x), BFLOAT16)
    np.testing.assert_array_equal(x.astype(BFLOAT16), device.download(narrow))
    wide = cast.cast(put(device, x.astype(BFLOAT16)), np.float32)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(x.astype(BFLOAT16).astype(np.float32), device.download(wide))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=str)
def test_bytes_of_images_become_numbers(device, dtype):
    x = np.arange(256, dtype=np.uint8).reshape(2, 128)
    y = device.download(cast.cast(device.upload(x), dtype))
    assert y.dtype == dtype
    np.testing.assert_array_equal(x, y.astype(np.int64))


def test_what_is_not_finite_stays_so(device):
    x = np.array([np.inf, -np.inf, np.nan, 3.4e38, -0.0], np.float32)
    y = device.download(cast.cast(device.upload(x), BFLOAT16)).astype(np.float32)
    np.testing.assert_array_equal([np.inf, -np.inf, np.nan, np.inf, 0.0], y)
    assert np.signbit(y[4])


def test_the_host_casts_too_and_returns_what_needs_no_change(random):
    x = draw(random, (3, 5))
    assert ops.cast(x, np.float32) is x
    narrow = ops.cast(x, BFLOAT16)
    np.testing.assert_array_equal(x.astype(BFLOAT16), narrow)
    assert ops.cast(narrow, BFLOAT16) is narrow
    assert ops.cast(narrow, np.float32).dtype == np.float32


def test_other_types_are_refused():
    with pytest.raises(ShapeError, match="cast: float32 to int32"):
        ops.cast(np.ones(3, np.float32), np.int32)
    with pytest.raises(ShapeError, match="cast: complex64 to float32"):
        ops.cast(np.ones(3, np.complex64), np.float32)
