"""Pooled host memory: aligned, recycled, never shared by two living arrays."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hpcnn import arrays
from hpcnn.errors import ConfigError


@pytest.fixture(scope="module", autouse=True)
def _collected():
    """Let go of the arrays of other tests."""
    gc.collect()


@pytest.fixture(autouse=True)
def empty_pool():
    """Start and end with no free blocks."""
    arrays.release_pool()
    yield
    arrays.release_pool()


@pytest.mark.parametrize("shape", [(3,), (), (0, 5), (200, 300), (7, 11, 13, 17), 100_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, bool, "int32"])
def test_arrays_have_the_shape_and_type_asked_for(shape, dtype):
    x = arrays.empty(shape, dtype)
    assert (shape if isinstance(shape, tuple) else (shape,)) == x.shape
    assert x.dtype == np.dtype(dtype)
    assert x.flags.c_contiguous
    assert x.flags.writeable
    x[...] = 1
    assert (x == 1).all()


@pytest.mark.parametrize("num_bytes", [arrays.SMALLEST_POOLED_BYTES, 100_001, 5_000_000])
def test_large_arrays_are_aligned(num_bytes):
    for _ in range(5):
        assert arrays.empty(num_bytes, np.uint8).ctypes.data % arrays.ALIGNMENT_BYTES == 0


def test_pages_of_a_dead_array_serve_the_next_of_its_size():
    address = arrays.empty((1 << 18,)).ctypes.data
    assert arrays.empty((1 << 9, 1 << 9)).ctypes.data == address
    assert arrays.empty((1 << 17,), np.float64).ctypes.data == address


def test_a_free_block_serves_smaller_arrays_unless_most_of_it_would_lie_idle():
    address = arrays.empty((1 << 18,)).ctypes.data
    smaller = arrays.empty((1 << 17,))
    assert smaller.ctypes.data == address
    del smaller
    other = arrays.empty(((1 << 17) - 1024,))
    assert other.ctypes.data != address
    assert arrays.release_pool() == 1 << 20


def test_the_smallest_block_that_serves_is_taken():
    larger, fitting = arrays.empty((300_000,)), arrays.empty((250_000,))
    address = fitting.ctypes.data
    del larger, fitting
    assert arrays.empty((200_000,)).ctypes.data == address


def test_a_view_keeps_the_pages_from_being_handed_out():
    x = arrays.empty((1000, 1000))
    x[...] = 7.0
    view = x[500:, ::3]
    del x
    y = arrays.empty((1000, 1000))
    y[...] = 8.0
    assert not np.shares_memory(view, y)
    assert (view == 7.0).all()


def test_living_arrays_never_share_memory():
    living = [arrays.empty((1 << 15,)) for _ in range(20)]
    del living[::2]
    living += [arrays.empty((1 << 15,)) for _ in range(15)]
    for number, x in enumerate(living):
        x[...] = number
    assert all((x == number).all() for number, x in enumerate(living))


def test_threads_never_get_the_same_pages():
    def work(number):
        for _ in range(200):
            x = arrays.empty((1 << 14,))
            x.fill(number)
            if not (x == number).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_release_gives_the_free_pages_back_and_says_how_many_bytes():
    x = arrays.empty((1 << 18,))
    y = arrays.empty((1 << 18,))
    del x
    assert arrays.release_pool() == 1 << 20
    assert arrays.release_pool() == 0
    del y
    assert arrays.release_pool() == 1 << 20


def test_small_arrays_are_not_pooled():
    del_me = arrays.empty(arrays.SMALLEST_POOLED_BYTES // 4 - 1)
    del del_me
    assert arrays.release_pool() == 0


def test_empty_like_takes_shape_and_type():
    for x in (np.zeros((3, 4)), np.zeros((300, 400), np.int32), np.zeros((4, 3)).T):
        y = arrays.empty_like(x)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_numpy_arrays_are_numpys():
    assert arrays.array_module(np.zeros(1)) is np


def test_bfloat16_has_two_bytes_and_the_range_of_float32():
    dtype = arrays.bfloat16()
    assert dtype.itemsize == 2
    assert np.isfinite(np.array(3e38).astype(dtype).astype(np.float64))


def test_who_lacks_bfloat16_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(
        ConfigError, match=r"bf16: the Python package ml_dtypes is not installed. Install hpcnn\[bf16\]"
    ):
        arrays.bfloat16()
