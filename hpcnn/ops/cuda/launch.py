"""How elementwise kernels and kernels over (rows, columns) are launched: vector widths, blocks and grids."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcnn.arrays import Array, Pair, Shape
from hpcnn.ops.cuda.device import GIVEN, Launch, device, remembered
from hpcnn.ops.cuda.types import suffix

THREADS = 256
"""Threads of a block; sums over the rows of a block have room for so many."""
VECTOR_BYTES = 16
"""What one instruction of one thread moves at most."""
BLOCKS_PER_PROCESSOR = 8
"""Enough blocks of `THREADS` to fill a processor; what does not fit waits in loops over the grid."""
LARGEST_GRID_Y = 65535
LARGEST_INT = 2**31 - 1


def address(x: Array) -> int:
    """Return where the elements of an array begin, in bytes."""
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)


def aligned(width: int, *arrays: Array) -> bool:
    """Return whether vectors of `width` elements of each array begin at multiples of their size."""
    for x in arrays:  # noqa: SIM110 (twice as fast as a generator)
        if address(x) % (width * x.dtype.itemsize):
            return False
    return True


def vector_width(count: int, *arrays: Array) -> int:
    """Return how many elements a thread moves at once: 16 bytes of the first array if they divide `count`, or one.

    Parameters
    ----------
    count : int
        Elements that lie next to each other in each array, such as channels.
    arrays : Array
        What is read or written in vectors of equally many elements; each must be aligned to its own vectors.
    """
    width = VECTOR_BYTES // int(arrays[0].dtype.itemsize)
    return width if count % width == 0 and aligned(width, *arrays) else 1


def variant(width: int) -> str:
    """Return how kernels name a vector width."""
    return "vector" if width > 1 else "scalar"


def flat_grid(count: int, per_processor: int = BLOCKS_PER_PROCESSOR) -> tuple[int]:
    """Return a grid of blocks of `THREADS` for `count` threads, no larger than the device can run at once."""
    return (max(1, min(-(-count // THREADS), device().num_processors * per_processor)),)


def elementwise(source: str, kernel: str, dtype: Any, width: int, arrays: tuple[Array, ...], *args: Any) -> None:
    """Launch a kernel (arrays..., count, args...) over flat arrays, `width` elements a thread if they are aligned.

    Parameters
    ----------
    source, kernel : str
        File, and name of the kernel but for its variant and type.
    dtype : dtype or str
        The type in the kernel's name.
    width : int
        Elements of the vector variant.
    arrays : tuple of Array
        Of equal size; nothing is launched for empty ones.
    """
    count = arrays[0].size
    if count == 0:
        return
    width = width if aligned(width, *arrays) else 1
    _elementwise(source, kernel, dtype, width, len(arrays), count, len(args))(*arrays, *args)


@remembered
def _elementwise(source: str, kernel: str, dtype: Any, width: int, arrays: int, count: int, args: int) -> Launch:
    """Return a kernel over so many flat arrays of `count` elements, which takes so many further arguments."""
    name = f"{kernel}_{variant(width)}_{dtype if isinstance(dtype, str) else suffix(dtype)}"
    grid, given = flat_grid(-(-count // width)), (*(GIVEN,) * arrays, np.int64(count), *(GIVEN,) * args)
    return device().prepare(source, name, grid, (THREADS,), *given)


def rows_block(columns: int) -> Pair:
    """Return a block (columns, rows) of at most `THREADS` threads; several of them side by side for many columns."""
    across = -(-columns // (-(-columns // 64)))
    return across, max(1, THREADS // across)


def rows_grid(rows: int, columns: int, *, rows_per_thread: int, per_processor: int) -> tuple[Pair, Pair]:
    """Return grid and block over (rows, columns) for kernels whose threads take rows a grid apart.

    Parameters
    ----------
    rows, columns : int
        Extents in threads.
    rows_per_thread : int
        Rows of a thread where there are few; more where the grid would get too large.
    per_processor : int
        Blocks to fill a processor with.
    """
    block = rows_block(columns)
    across = -(-columns // block[0])
    wanted = -(-rows // (block[1] * rows_per_thread))
    most = max(1, min(device().num_processors * per_processor // across, LARGEST_GRID_Y))
    return (across, min(wanted, most)), block


def empty_like(x: Array, dtype: Any = None, shape: Shape | None = None) -> Array:
    """Return an uninitialised array of the shape and type of `x`, or of others, on the device in use."""
    return device().empty(tuple(x.shape) if shape is None else shape, x.dtype if dtype is None else dtype)
