"""The door between the operators and whatever runs kernels: a GPU through CuPy, or the emulation of the tests.

Operators of this package allocate with `device().empty` and launch with `device().launch`; they never import CuPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from hpcnn.arrays import Array, Shape


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

    def measure(self, run: Any, repeats: int = 5) -> float:
        """Return the median duration of `run()` in seconds, warmed up, as the device's own clock has it."""


_device: Device | None = None


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


@contextmanager
def use(chosen: Device) -> Iterator[Device]:
    """Run kernels on `chosen` inside a `with` block; for tests."""
    global _device
    before, _device = _device, chosen
    try:
        yield chosen
    finally:
        _device = before
