"""A device without a GPU: kernels of `kernels/`, compiled for the host, on NumPy arrays.

`tests/emulation/README.md` says what is emulated and what it catches.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Shape
from hpcnn.ops.cuda.device import GIVEN, Launch
from tests.emulation import build
from tests.emulation.build import EmulationError

ASCENDING, DESCENDING = 0, 1
"""Orders in which threads, warps and blocks run; any other number is the seed of a random one."""

MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
# Dynamic shared memory that a block may ask for, by architecture.
MAX_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

GUARD_BYTES = 1 << 20
"""Memory before and behind an array that is reserved and may not be accessed."""


class Library:
    """The kernels of one file."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_describe.restype = ctypes.c_char_p
        self.kernels: dict[str, tuple[int, int, list[str]]] = {}
        for number, line in enumerate(self._library.emulation_describe().decode().splitlines()):
            name, max_threads, *parameters = line.split()
            self.kernels[name] = (number, int(max_threads), parameters)

    def launch(self, number: int, grid: list[int], block: list[int], shared: int, order: int, arguments: Any) -> str:
        """Run a kernel; what went wrong, or nothing."""
        message = ctypes.create_string_buffer(2000)
        extents = ctypes.c_uint * 3
        failed = self._library.emulation_launch(
            *(ctypes.c_uint(number), extents(*grid), extents(*block), ctypes.c_uint(shared), ctypes.c_uint(order)),
            *(arguments, message, ctypes.c_size_t(len(message))),
        )
        return message.value.decode() if failed else ""


class Emulator:
    """Runs kernels on the CPU, one thread after the other (see `hpcnn.ops.cuda.device.Device`).

    Parameters
    ----------
    architecture, num_processors : int
        What operators are told, so that they take one path or the other.
    order : int, optional
        In which order threads and blocks run: ASCENDING, DESCENDING, or the seed of a random order. None takes
        another one at every launch, in a fixed sequence.
    folders : sequence of Path, optional
        Where sources are looked for before `kernels/`.
    """

    def __init__(
        self, architecture: int = 90, num_processors: int = 4, order: int | None = None, folders: Sequence[Path] = ()
    ) -> None:
        self.architecture = architecture
        self.num_processors = num_processors
        self.name = f"emulation of sm_{architecture}"
        self.order = order
        self._orders = itertools.count()
        self._folders = (*folders, build.KERNELS)

    def empty(self, shape: Shape, dtype: Any) -> Array:
        """Return an array full of 0xff bytes, which are NaN and -1: what a kernel leaves out shows.

        The memory before and behind it cannot be accessed, so that indices outside end the launch.
        """
        kind = np.dtype(dtype)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return _guarded(num_bytes).view(kind).reshape(shape)

    def scratch(self, count: int, dtype: Any) -> Array:
        """Return an array of its own, full of 0xff bytes."""
        return self.empty((count,), dtype)

    def upload(self, x: Any, dtype: Any = None) -> Array:
        """Return a C-ordered copy."""
        host = np.asarray(x, dtype)
        copy = self.empty(host.shape, host.dtype)
        copy[...] = host
        return copy

    def download(self, x: Array) -> np.ndarray:
        """Return a copy."""
        return x.copy()

    def launch(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        *args: Any,
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel to its end; TypeError refuses arguments, EmulationError all else that a GPU would fail for."""
        library = _library(source, self._folders)
        if kernel not in library.kernels:
            raise EmulationError(
                f"emulation: {source}.cu has no kernel {kernel} (it has {', '.join(library.kernels)})."
            )
        number, max_threads, parameters = library.kernels[kernel]
        full_grid, full_block = self._extents(kernel, grid, block, max_threads)
        limit = MAX_SHARED_BYTES.get(self.architecture, 227 << 10)
        if not 0 <= shared_bytes <= limit:
            raise EmulationError(
                f"{kernel}: {shared_bytes} bytes of shared memory; sm_{self.architecture} has {limit}."
            )
        values = _arguments(kernel, parameters, args)
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        order = next(self._orders) if self.order is None else self.order
        with _lock:
            problem = library.launch(number, full_grid, full_block, shared_bytes, order, addresses)
        if problem:
            raise EmulationError(f"{kernel} (order {order}): {problem}")

    def prepare(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        *args: Any,
        shared_bytes: int = 0,
    ) -> Launch:
        """Return a launch that is ready but for what is `GIVEN`."""

        def start(*given: Any) -> None:
            rest = iter(given)
            whole = [next(rest) if arg is GIVEN else arg for arg in args]
            if any(True for _ in rest):
                raise TypeError(f"{kernel}: {len(given)} arguments given; there is no room for so many.")
            self.launch(source, kernel, grid, block, *whole, shared_bytes=shared_bytes)

        return start

    def measure(self, run: Any, repeats: int = 5) -> float:
        """Return the median duration of `run()` in seconds, by the host's clock."""
        run()
        durations = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            durations.append(time.perf_counter() - started)
        return sorted(durations)[repeats // 2]

    def _extents(
        self, kernel: str, grid: Sequence[int], block: Sequence[int], max_threads: int
    ) -> tuple[list[int], list[int]]:
        """Return grid and block in three extents, refused if a GPU would."""
        full = []
        for what, extents, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            three = [int(extent) for extent in extents] + [1] * (3 - len(extents))
            if len(three) > 3 or any(not 1 <= extent <= limit for extent, limit in zip(three, limits)):
                raise EmulationError(f"{kernel}: {what} {tuple(extents)}; extents must be 1 to {limits}.")
            full.append(three)
        threads = int(np.prod(full[1]))
        if threads > max_threads:
            raise EmulationError(f"{kernel}: blocks of {threads} threads; its launch bounds allow {max_threads}.")
        return full[0], full[1]


def _guarded(num_bytes: int) -> np.ndarray:
    """Return bytes of 0xff, 16-byte aligned, that end (to 15 bytes) where accessible memory does."""
    page, guard = mmap.PAGESIZE, GUARD_BYTES
    used = -(-num_bytes // 16) * 16
    total = -(-used // page) * page + 2 * guard
    memory = mmap.mmap(-1, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    inside = whole[total - guard - used : total - guard]
    inside[:] = 0xFF
    for start in (0, total - guard):
        if _libc.mprotect(ctypes.c_void_p(whole.ctypes.data + start), ctypes.c_size_t(guard), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return inside[:num_bytes]


_libc = ctypes.CDLL(None, use_errno=True)
_lock = threading.Lock()
_libraries: dict[Path, Library] = {}


def _library(source: str, folders: Sequence[Path]) -> Library:
    """Return the library of a source, loaded once."""
    path = next((folder / f"{source}.cu" for folder in folders if (folder / f"{source}.cu").is_file()), None)
    if path is None:
        raise EmulationError(f"emulation: there is no {source}.cu.")
    with _lock:
        if path not in _libraries:
            _libraries[path] = Library(build.library(path))
        return _libraries[path]


def _arguments(kernel: str, parameters: list[str], args: tuple[Any, ...]) -> list[np.ndarray]:
    """Return every argument as an array that holds its value (pointers by their addresses)."""
    if len(args) != len(parameters):
        raise TypeError(f"{kernel}: {len(args)} arguments for {len(parameters)} parameters ({' '.join(parameters)}).")
    values = []
    for place, (parameter, arg) in enumerate(zip(parameters, args)):
        who = f"{kernel}: argument {place} of kernel parameter {parameter}"
        pointer = arg is None or (isinstance(arg, np.ndarray) and arg.dtype.names is None)
        if pointer != parameter.startswith("p"):
            raise TypeError(f"{who} is {type(arg).__name__}.")
        values.append(_address(who, parameter[1:], arg) if pointer else _value(who, parameter, arg))
    return values


def _address(who: str, pointee: str, arg: np.ndarray | None) -> np.ndarray:
    """Return the address of an array whose elements are what the kernel takes them for."""
    if arg is None:
        return np.array(0, np.uint64)
    if not arg.flags.c_contiguous:
        raise TypeError(f"{who} is not C-ordered (shape {arg.shape}, strides {arg.strides}).")
    given = _code(arg.dtype)
    if given != pointee and pointee[0] in "fbiu" and {given[0], pointee[0]} not in ({"i", "u"}, {"b", "u"}):
        raise TypeError(f"{who} has elements of {arg.dtype}.")
    return np.array(arg.ctypes.data, np.uint64)


def _value(who: str, parameter: str, arg: Any) -> np.ndarray:
    """Return a number or structure of exactly the parameter's type."""
    if not isinstance(arg, np.generic | np.ndarray):
        raise TypeError(f"{who} is {type(arg).__name__}; pass a NumPy scalar of its type.")
    if _code(arg.dtype) != parameter or arg.ndim:
        raise TypeError(f"{who} is {arg.dtype} ({arg.dtype.itemsize} bytes).")
    return np.ascontiguousarray(arg).reshape(())


def _code(dtype: np.dtype[Any]) -> str:
    """Return how the library describes a type: kind and bytes."""
    kind = "s" if dtype.names is not None else "b" if dtype.name == "bfloat16" else dtype.kind
    return f"{'u' if kind == 'b' and dtype.name == 'bool' else kind}{dtype.itemsize}"
