"""The door between the operators and whatever runs kernels: a GPU through CuPy, or the emulation of the tests.

Operators of this package allocate with `device().empty` and launch with `device().launch`; they never import CuPy.

A step of a deep network is hundreds of launches, and Python must queue them faster than the device runs them. What an
operator does the same way for every array of a shape it therefore does once: functions that are `remembered` return
launches that `device().prepare` has made ready, and a repeated call looks one up, allocates, and starts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol, TypeAlias, TypeVar

from hpcnn.arrays import Array, Shape

Launch: TypeAlias = Callable[..., None]
"""Starts a prepared kernel; takes what stood as `GIVEN` when it was prepared."""

GIVEN: Any = object()
"""In `Device.prepare`: an argument that every call brings, an array, None or a structure."""


class Device(Protocol):
    """Runs kernels, in the order in which they are launched.

    Attributes
    ----------
    architecture : int
        Compute capability as in sm_90: 90.
    num_processors : int
        Streaming multiprocessors.
    name : str
        For tables and logs.
    """

    architecture: int
    num_processors: int
    name: str

    def empty(self, shape: Shape, dtype: Any) -> Array:
        """Return an uninitialised C-ordered array."""

    def scratch(self, count: int, dtype: Any) -> Array:
        """Return at least `count` uninitialised elements, which are the caller's until the operator ends.

        Kernels run in order, so the next operator of this thread may overwrite what this one's have read by then. An
        operator may have one scratch of a type at a time. Much cheaper than `empty`.
        """

    def upload(self, x: Any, dtype: Any = None) -> Array:
        """Return a copy of a host array on this device."""

    def download(self, x: Array) -> Any:
        """Return a copy of an array as a NumPy array, having waited for what makes it."""

    def launch(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        *args: Any,
        shared_bytes: int = 0,
    ) -> None:
        """Start a kernel.

        Parameters
        ----------
        source : str
            File of `kernels/` without its ending.
        kernel : str
            Name of the `extern "C" __global__` function.
        grid, block : sequence of int
            Up to three extents each.
        args
            In the kernel's order: arrays of this device and None (pointers), NumPy scalars of exactly the parameter's
            type, and 0-d structured NumPy arrays (structures by value). Plain Python numbers are refused.
        shared_bytes : int
            Dynamic shared memory; more than 48 KiB is allowed.
        """

    def prepare(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        *args: Any,
        shared_bytes: int = 0,
    ) -> Launch:
        """Return a function that starts a kernel as `launch` does, for what stands as `GIVEN` among `args`.

        All other arguments are those of every call: NumPy scalars and structures, which must not change afterwards.
        """

    def measure(self, run: Any, repeats: int = 5) -> float:
        """Return the median duration of `run()` in seconds, warmed up, as the device's own clock has it."""


_device: Device | None = None
_forgetful: list[Callable[[], None]] = []

F = TypeVar("F", bound=Callable[..., Any])


def device() -> Device:
    """Return the device in use; the first call opens the GPU that CuPy has current.

    Raises
    ------
    DeviceError
        If there is no CuPy, no GPU, or the driver is too old.
    """
    global _device
    if _device is None:
        from hpcnn.ops.cuda import gpu  # imports CuPy

        _device = gpu.Gpu()
    return _device


def remembered(function: F) -> F:
    """Return a function that remembers its results, by hashable arguments, while the device in use is the same."""
    found = lru_cache(maxsize=4096)(function)
    _forgetful.append(found.cache_clear)
    return found  # type: ignore[return-value]


def when_changed(forget: Callable[[], None]) -> None:
    """Have a function called whenever another device comes into use."""
    _forgetful.append(forget)


@contextmanager
def use(chosen: Device) -> Iterator[Device]:
    """Run kernels on `chosen` inside a `with` block; for tests."""
    before = _device
    _change(chosen)
    try:
        yield chosen
    finally:
        _change(before)


def _change(to: Device | None) -> None:
    global _device
    _device = to
    for forget in _forgetful:
        forget()
