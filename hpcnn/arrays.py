"""Arrays: the protocol that `ops` relies on, and pooled host memory.

An activation of a large network is hundreds of megabytes. Fresh pages for it cost about a quarter of a second
a gigabyte, every step; `empty` hands the pages of the last step out again instead, as CuPy's pool does on GPUs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

# A NumPy or CuPy array. Both follow one protocol; which one it is decides the implementation (see hpcnn.ops).
Array: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
Pair: TypeAlias = tuple[int, int]
Padding: TypeAlias = tuple[Pair, Pair]

ALIGNMENT_BYTES = 64
SMALLEST_POOLED_BYTES = 1 << 16
LARGEST_FIT = 2
"""A free block serves requests down to its size over this: tiles of many sizes share a few blocks."""

# Free blocks by size. Lists only: append and pop are atomic, so a block may come back from any thread,
# and from inside a garbage collection, without a lock.
_free: dict[int, list[np.ndarray]] = {}


class _Block:
    """Owner of one pooled piece of memory; gives it back when the last array on it dies."""

    __slots__ = ("__array_interface__", "_memory")

    def __init__(self, num_bytes: int) -> None:
        size = -(-num_bytes // 4096) * 4096
        memory = _recycled(size)
        if memory is None:
            raw = np.empty(size + ALIGNMENT_BYTES, dtype=np.uint8)
            offset = -raw.ctypes.data % ALIGNMENT_BYTES
            memory = raw[offset : offset + size]
        self._memory = memory
        self.__array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self._memory.ctypes.data, False),
            "version": 3,
        }

    def __del__(self) -> None:
        free = _free  # None while the interpreter shuts down
        if free is not None:
            free.setdefault(self._memory.nbytes, []).append(self._memory)


def _recycled(size: int) -> np.ndarray | None:
    """Return the smallest free block that serves `size` without much waste."""
    for found in (size, *sorted(other for other in list(_free) if size < other <= LARGEST_FIT * size)):
        try:
            return _free.get(found, []).pop()
        except IndexError:
            pass
    return None


def empty(shape: Shape | int, dtype: Any = np.float32) -> np.ndarray:
    """Return an uninitialised C-ordered host array, 64-byte aligned, on recycled pages when it is large."""
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    num_bytes = dtype.itemsize
    for extent in shape:
        num_bytes *= extent
    if num_bytes < SMALLEST_POOLED_BYTES:
        return np.empty(shape, dtype)
    block: np.ndarray = np.asarray(_Block(num_bytes))
    typed: np.ndarray = block.view(dtype)
    return typed.reshape(shape)


def empty_like(x: Array) -> Array:
    """Return an uninitialised array of the shape, type and device of `x`."""
    return empty(x.shape, x.dtype) if isinstance(x, np.ndarray) else array_module(x).empty_like(x)


def release_pool() -> int:
    """Give the free blocks back to the system and return how many bytes that was."""
    released = 0
    for size in list(_free):
        released += size * len(_free.pop(size, []))
    return released


def array_module(x: Array) -> ModuleType:
    """Return the module, numpy or cupy, that made `x`."""
    if isinstance(x, np.ndarray):
        return np
    import cupy  # only ever reached with an array that cupy made

    return cupy  # type: ignore[no-any-return]
