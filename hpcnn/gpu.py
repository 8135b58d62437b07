"""The GPU as memory, streams and events: all that the code above the operators asks of CuPy.

Kernels run on CuPy's current stream, here the compute stream. Copies between host and device run on one stream of
their own, beside the kernels, and only from and to page-locked memory, which the GPU reads by itself. Who copies asks
the copy stream to wait for what has been launched so far, and who computes with the result waits for the copy's event.

CUDA keeps one current device for each thread: whoever comes from another thread gets this process's first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from hpcnn.arrays import Array, Shape, empty
from hpcnn.errors import DeviceError

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
"""`cudaMemcpyKind`."""


class Event(Protocol):
    """A point in a stream."""

    @property
    def done(self) -> bool:
        """Whether the device has come past it."""


class Copies(Protocol):
    """Copies between device arrays and page-locked host arrays, in the order in which they are asked for."""

    def locked(self, count: int, dtype: Any) -> np.ndarray:
        """Return a flat page-locked host array; it must not be let go while copies of it are on their way."""

    def after_kernels(self) -> None:
        """Let the copies that follow wait for all kernels launched so far by this thread."""

    def download(self, source: Array, target: np.ndarray) -> None:
        """Begin to copy a contiguous device array to the host; sizes and types are equal."""

    def upload(self, source: np.ndarray, target: Array) -> None:
        """Begin to copy a host array to a contiguous device array."""

    def beside(self, action: Callable[[int], None]) -> None:
        """Have `action` launch something on the stream of the copies, whose handle it gets."""

    def event(self) -> Event:
        """Return the event that follows the copies begun so far."""

    def before_kernels(self, event: Event) -> None:
        """Let the kernels that this thread launches from now on wait for an event."""


def choose(local_rank: int) -> None:
    """Make a GPU current for this thread: the one with the number `local_rank`, modulo their number."""
    cupy = _cupy()
    cupy.cuda.Device(local_rank % cupy.cuda.runtime.getDeviceCount()).use()


def identity() -> str:
    """Return what tells the current GPU from all others of its node."""
    return str(_cupy().cuda.Device().pci_bus_id)


def synchronise() -> None:
    """Return once all that was launched on the compute stream is done."""
    _cupy().cuda.get_current_stream().synchronize()


def peak_memory_bytes() -> int:
    """Return the most device memory that this process has held for arrays: the pool gives nothing back by itself."""
    return int(_cupy().get_default_memory_pool().total_bytes())


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn what CuPy raises when device memory has run out, inside a `with` block, into DeviceError."""
    cupy = _cupy()
    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise DeviceError(
            f"gpu: out of memory ({error}); a step must fit. Lower train.global_batch, or start more ranks."
        ) from None


class Ranges:
    """Named ranges on the timeline of NVIDIA's profilers (NVTX)."""

    def __init__(self) -> None:
        from cupy.cuda import nvtx

        self._push, self._pop = nvtx.RangePush, nvtx.RangePop

    def push(self, name: str) -> None:
        """Begin a range, inside those that have begun."""
        self._push(name)

    def pop(self) -> None:
        """End the range that began last."""
        self._pop()

    def synchronise(self) -> None:
        """Return once all kernels launched so far are done."""
        synchronise()


class CopyStream:
    """`Copies` on a stream of their own, for the device that is current when it is made."""

    def __init__(self) -> None:
        self._cupy = _cupy()
        self._runtime = self._cupy.cuda.runtime
        self._device = self._cupy.cuda.Device()
        self._stream = self._cupy.cuda.Stream(non_blocking=True)
        self._here = threading.local()

    def locked(self, count: int, dtype: Any) -> np.ndarray:
        """See `Copies`."""
        dtype = np.dtype(dtype)
        memory = self._cupy.cuda.alloc_pinned_memory(max(1, count * dtype.itemsize))
        return np.frombuffer(memory, dtype, count)

    def after_kernels(self) -> None:
        """See `Copies`."""
        self._use()
        launched = self._cupy.cuda.Event(disable_timing=True)
        launched.record(self._cupy.cuda.get_current_stream())
        self._stream.wait_event(launched)

    def download(self, source: Array, target: np.ndarray) -> None:
        """See `Copies`."""
        self._copy(target.ctypes.data, source.data.ptr, target.nbytes, DEVICE_TO_HOST)

    def upload(self, source: np.ndarray, target: Array) -> None:
        """See `Copies`."""
        self._copy(target.data.ptr, source.ctypes.data, source.nbytes, HOST_TO_DEVICE)

    def beside(self, action: Callable[[int], None]) -> None:
        """See `Copies`."""
        self._use()
        action(self._stream.ptr)

    def event(self) -> Any:
        """See `Copies`."""
        self._use()
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self._stream)
        return event

    def before_kernels(self, event: Any) -> None:
        """See `Copies`."""
        self._cupy.cuda.get_current_stream().wait_event(event)

    def _copy(self, target: int, source: int, num_bytes: int, kind: int) -> None:
        self._use()
        if num_bytes:
            self._runtime.memcpyAsync(target, source, num_bytes, kind, self._stream.ptr)

    def _use(self) -> None:
        """Make the device current for this thread, once."""
        if not getattr(self._here, "chosen", False):
            self._device.use()
            self._here.chosen = True


class Uploads:
    """Brings batches to the device while it computes; at most `SLOTS` are on their way."""

    SLOTS = 2

    def __init__(self, copies: Copies, like: Array) -> None:
        self._copies = copies
        self._like = like
        self._slots: list[tuple[np.ndarray | None, Event | None]] = [(None, None)] * self.SLOTS
        self._next = 0

    def begin(self, x: np.ndarray) -> Upload:
        """Begin to copy a host array, which may change afterwards."""
        memory, event = self._slots[self._next]
        while event is not None and not event.done:
            time.sleep(50e-6)  # of two batches ago: hardly ever
        if memory is None or memory.nbytes < x.nbytes:
            memory = self._copies.locked(x.nbytes, np.uint8)
        locked = memory[: x.nbytes].view(x.dtype)
        locked.reshape(x.shape)[...] = x
        array = empty(x.shape, x.dtype, like=self._like)
        self._copies.after_kernels()  # the memory may have been another array's
        self._copies.upload(locked, array)
        event = self._copies.event()
        self._slots[self._next] = memory, event
        self._next = (self._next + 1) % self.SLOTS
        return Upload(self._copies, array, event)


class Upload:
    """A copy on its way to the device. `shape` is that of the array."""

    def __init__(self, copies: Copies, array: Array, event: Event) -> None:
        self.shape: Shape = array.shape
        self._copies, self._array, self._event = copies, array, event

    def array(self) -> Array:
        """Return the device array; kernels launched from now on find it complete."""
        self._copies.before_kernels(self._event)
        return self._array


class Nccl:
    """A communicator of NVIDIA's library, of which this process is one member (collective to make)."""

    def __init__(self, size: int, number: int, key: Any) -> None:
        from cupy.cuda import nccl

        self._nccl = nccl
        self._communicator = nccl.NcclCommunicator(size, key, number)

    @staticmethod
    def key() -> Any:
        """Return what one member makes and all pass."""
        from cupy.cuda import nccl

        return nccl.get_unique_id()

    def sum(self, array: Array, stream: int) -> None:
        """Begin to add up a contiguous float32 array over the members, in place."""
        place = array.data.ptr
        self._communicator.allReduce(place, place, array.size, self._nccl.NCCL_FLOAT32, self._nccl.NCCL_SUM, stream)


def _cupy() -> Any:
    """Return CuPy; whoever asks has opened a device (`hpcnn.ops.cuda.device`), which says what is missing."""
    import cupy  # heavy, and only where a GPU is used

    return cupy
