"""Tensor maps: what Hopper's copy engine has to know of an array that it copies from.

The driver encodes them (CUDA driver API, "Tensor Map Object Management"); it is called through ctypes. For arrays of
the host, which only the emulation computes on, a plain description takes the place of the driver's encoding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Pair
from hpcnn.errors import DeviceError

TENSOR_MAP = np.dtype([("opaque", np.uint64, (16,))])
"""`struct TensorMap` of `kernels/hopper.cuh`."""

DESCRIPTION = np.dtype(
    [
        ("address", np.uint64),
        ("strides", np.uint64, (3,)),
        ("extents", np.uint32, (4,)),
        ("box", np.uint32, (4,)),
        ("lower", np.int32, (2,)),
        ("upper", np.int32, (2,)),
        ("steps", np.uint32, (4,)),
        ("im2col", np.uint16),
        ("rank", np.uint16),
        ("element_bytes", np.uint16),
        ("unused", np.uint16, (13,)),
    ]
)
"""What the emulation reads instead (`Map` in `tests/emulation/hopper_emulation.h`)."""

WIDTH = 128
"""Bytes of a box along the innermost dimension: that of the widest swizzle."""
MAX_BOX = 256
ALIGNMENT = 64

# Numbers of cuda.h. Copying as tf32 rounds float32 to tf32 on the way.
TFLOAT32, BFLOAT16 = 11, 9
NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS = 0, 3, 3, 0


MOST_MAPS = 256
"""Addresses that `ByAddress` remembers at a time."""


class ByAddress:
    """Makes maps of arrays that differ in their addresses only, and remembers them."""

    def __init__(self, make: Callable[[Array], np.ndarray]) -> None:
        self._make = make
        self._found: dict[int, np.ndarray] = {}

    def __call__(self, x: Array) -> np.ndarray:
        """Return the map of an array."""
        address = x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr
        found = self._found.get(address)
        if found is None:
            if len(self._found) >= MOST_MAPS:
                self._found.clear()
            found = self._found[address] = self._make(x)
        return found


def tiled(x: Array, extents: Sequence[int], box: Sequence[int]) -> np.ndarray:
    """Return a map for copying boxes of an array.

    Parameters
    ----------
    x : Array
        C-ordered, float32 or bfloat16.
    extents : sequence of int
        Shape under which the array is seen, the innermost dimension first.
    box : sequence of int
        Extents of what one copy brings, in the same order; `box[0]` elements are 128 bytes.

    Returns
    -------
    numpy.ndarray of TENSOR_MAP, without axes
    """
    return _tiled(_address(x), x.dtype.itemsize, tuple(extents), tuple(box), isinstance(x, np.ndarray))


def im2col(x: Array, pixels: int, lower: Pair, upper: Pair, steps: Pair) -> np.ndarray:
    """Return a map for copying 128 bytes of channels of successive pixels, as windows of a convolution meet them.

    Parameters
    ----------
    x : Array, shape (N, H, W, C)
        C-ordered, float32 or bfloat16.
    pixels : int
        Base pixels a copy visits.
    lower, upper : (rows, columns)
        Corners of the base pixels of an image: from `lower` to (H - 1, W - 1) + `upper`, both included.
    steps : (rows, columns)
        From one base pixel to the next.

    Returns
    -------
    numpy.ndarray of TENSOR_MAP, without axes
    """
    return _im2col(_address(x), x.dtype.itemsize, x.shape, pixels, lower, upper, steps, isinstance(x, np.ndarray))


def together(maps: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return a structure of `count` maps: those given, and then bytes of zero that no kernel may use."""
    whole = np.dtype([("of", TENSOR_MAP, (count,))])
    memory = np.zeros(whole.itemsize + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    found = memory[first : first + whole.itemsize].view(whole).reshape(())
    for i, single in enumerate(maps):
        found["of"][i] = single
    return found


def storable(x: Array, columns: int) -> bool:
    """Return whether the copy engine can write (or read) an array in rows of so many elements."""
    return columns * x.dtype.itemsize % 16 == 0 and _address(x) % 16 == 0


def _address(x: Any) -> int:
    """Return where an array begins."""
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)


def _strides(extents: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return bytes from one index to the next, of all dimensions but the innermost."""
    return tuple(int(stride) * itemsize for stride in np.cumprod(extents[:-1], dtype=np.int64))


@lru_cache(4096)
def _tiled(address: int, itemsize: int, extents: tuple[int, ...], box: tuple[int, ...], host: bool) -> np.ndarray:
    rank, strides = len(extents), _strides(extents, itemsize)
    if host:
        return _describe(address, itemsize, extents, strides, box, im2col=0)
    return _encode(
        "cuTensorMapEncodeTiled",
        *(_element(itemsize), ctypes.c_uint32(rank), ctypes.c_void_p(address)),
        *((ctypes.c_uint64 * rank)(*extents), (ctypes.c_uint64 * (rank - 1))(*strides)),
        *((ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank)),
    )


@lru_cache(4096)
def _im2col(
    address: int, itemsize: int, shape: tuple[int, ...], pixels: int, lower: Pair, upper: Pair, steps: Pair, host: bool
) -> np.ndarray:
    extents, channels = shape[::-1], WIDTH // itemsize
    strides = _strides(extents, itemsize)
    if host:
        corners = {"lower": lower[::-1], "upper": upper[::-1], "steps": (1, *steps[::-1], 1)}
        return _describe(address, itemsize, extents, strides, (channels, pixels), im2col=1, **corners)
    return _encode(
        "cuTensorMapEncodeIm2col",
        *(_element(itemsize), ctypes.c_uint32(4), ctypes.c_void_p(address)),
        *((ctypes.c_uint64 * 4)(*extents), (ctypes.c_uint64 * 3)(*strides)),
        *((ctypes.c_int * 2)(*lower[::-1]), (ctypes.c_int * 2)(*upper[::-1])),
        *(ctypes.c_uint32(channels), ctypes.c_uint32(pixels), (ctypes.c_uint32 * 4)(1, *steps[::-1], 1)),
    )


def _element(itemsize: int) -> ctypes.c_int:
    return ctypes.c_int(BFLOAT16 if itemsize == 2 else TFLOAT32)


def _encode(function: str, *args: Any) -> np.ndarray:
    """Return what the driver's function makes of its arguments, of which the first and the last four are added here.

    Raises
    ------
    DeviceError
        If it refuses them.
    """
    encoded = _empty()
    options = (ctypes.c_int(option) for option in (NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS))
    status = getattr(_driver(), function)(ctypes.c_void_p(encoded.ctypes.data), *args, *options)
    if status:
        raise DeviceError(f"gpu: {function} refused a tensor map (CUDA error {status}). Report it.")
    return encoded


@lru_cache(1)
def _driver() -> ctypes.CDLL:
    """Return CUDA's driver library, which CuPy has loaded before."""
    return ctypes.CDLL("libcuda.so.1")


def _describe(
    address: int, itemsize: int, extents: Sequence[int], strides: Sequence[int], box: Sequence[int], **rest: Any
) -> np.ndarray:
    """Return the emulation's description."""
    encoded = _empty()
    description = encoded.view(DESCRIPTION)
    description[...] = 0
    description["address"], description["element_bytes"], description["rank"] = address, itemsize, len(extents)
    description["extents"][: len(extents)], description["strides"][: len(strides)] = extents, strides
    description["box"][: len(box)] = box
    for name, value in rest.items():
        description[name] = value
    return encoded


def _empty() -> np.ndarray:
    """Return an uninitialised map, aligned as the driver and the kernels want it."""
    memory = np.empty(TENSOR_MAP.itemsize + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + TENSOR_MAP.itemsize].view(TENSOR_MAP).reshape(())
