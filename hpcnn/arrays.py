"""Arrays: the protocol that `ops` relies on, where they live, and pooled host memory.

An array lives where the arrays that it is made from do: parameters are put on a device by name, and everything else
is allocated `like` its neighbours. Only code that asks `on_host` treats the two kinds of memory differently.

An activation of a large network is hundreds of megabytes. Fresh pages for it cost about a quarter of a second
a gigabyte, every step; `empty` hands the pages of the last step out again instead, as CuPy's pool does on GPUs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np

from hpcnn.errors import ConfigError

# A NumPy or CuPy array. Both follow one protocol; which one it is decides the implementation (see hpcnn.ops).
Array: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
Pair: TypeAlias = tuple[int, int]
Padding: TypeAlias = tuple[Pair, Pair]
Place: TypeAlias = Literal["cpu", "cuda"]
"""Host memory, or that of the GPU which CuPy has current."""

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
        if free is not None and hasattr(self, "_memory"):  # there is none where it could not be had
            free.setdefault(self._memory.nbytes, []).append(self._memory)


def _recycled(size: int) -> np.ndarray | None:
    """Return the smallest free block that serves `size` without much waste."""
    for found in (size, *sorted(other for other in list(_free) if size < other <= LARGEST_FIT * size)):
        try:
            return _free.get(found, []).pop()
        except IndexError:
            pass
    return None


def empty(shape: Shape | int, dtype: Any = np.float32, *, like: Array | None = None, place: Place = "cpu") -> Array:
    """Return an uninitialised C-ordered array.

    On the host it is 64-byte aligned, and on recycled pages when it is large.

    Parameters
    ----------
    shape : tuple of int or int
    dtype : data type
    like : Array, optional
        Lives where this one does.
    place : str
        Where it lives if `like` is left out.
    """
    if (place == "cuda") if like is None else not isinstance(like, np.ndarray):
        return _device_empty(shape, dtype)
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


def bfloat16() -> np.dtype[Any]:
    """Return NumPy's type of 16-bit numbers with the range of float32.

    Raises
    ------
    ConfigError
        If ml_dtypes, which brings it, is not installed.
    """
    try:
        import ml_dtypes  # only where bf16 is computed with
    except ImportError as error:
        raise ConfigError(
            "bf16: the Python package ml_dtypes is not installed. Install hpcnn[bf16], or compute in fp32."
        ) from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def empty_like(x: Array) -> Array:
    """Return an uninitialised array of the shape, type and device of `x`."""
    return empty(x.shape, x.dtype, like=x)


def zeros(shape: Shape | int, dtype: Any = np.float32, *, like: Array | None = None, place: Place = "cpu") -> Array:
    """Return a C-ordered array of zeros; parameters are those of `empty`."""
    x = empty(shape, dtype, like=like, place=place)
    x.fill(0)
    return x


def on_host(x: Array) -> bool:
    """Return whether an array lives in host memory."""
    return isinstance(x, np.ndarray)


def on_device(x: Any) -> bool:
    """Return whether something is an array in the memory of a GPU."""
    return not isinstance(x, np.ndarray) and hasattr(x, "__cuda_array_interface__")


def to_host(x: Array) -> np.ndarray:
    """Return an array in host memory, having waited for what makes it; itself where it lives there."""
    return x if isinstance(x, np.ndarray) else x.get()


def to_device(x: np.ndarray, like: Array) -> Array:
    """Return a host array where `like` lives: itself, or a copy that may be used at once."""
    if isinstance(like, np.ndarray):
        return x
    y = empty(x.shape, x.dtype, like=like)
    y.set(np.ascontiguousarray(x))
    return y


def overwrite(target: Array, source: np.ndarray) -> None:
    """Copy a host array of the same shape and type into `target`, C-contiguous, wherever that lives."""
    if isinstance(target, np.ndarray):
        target[...] = source
    elif target.size:
        target.set(np.ascontiguousarray(source))


def _device_empty(shape: Shape | int, dtype: Any) -> Array:
    import cupy  # only ever reached where a GPU is in use

    return cupy.empty(shape, dtype)


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
