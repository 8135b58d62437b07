"""Stands for CuPy and the driver behind it: arrays lie on the host, launches are noted, errors come when asked for."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


class DriverError(RuntimeError):
    """An error of the driver."""


class RuntimeError_(RuntimeError):  # noqa: N801 N818
    """An error of the runtime, with its number."""

    def __init__(self, status: int) -> None:
        super().__init__(f"error {status}")
        self.status = status


class OutOfMemoryError(MemoryError):
    """The pool is exhausted."""


class Array:
    """An array on a device of its own."""

    driver: Driver

    def __init__(self, shape: Any, dtype: Any = np.float32, *, device: int = 0, gaps: bool = False) -> None:
        if not gaps and device == 0:
            self.driver.fail("ndarray", OutOfMemoryError())
        self._host = np.empty(shape, dtype)
        self.shape, self.dtype = self._host.shape, self._host.dtype
        self.data = SimpleNamespace(ptr=self._host.ctypes.data)
        self.device = SimpleNamespace(id=device)
        self.flags = SimpleNamespace(c_contiguous=not gaps, f_contiguous=False)

    def get(self) -> np.ndarray:
        """Return a copy on the host."""
        self.driver.fail("get")
        return self._host.copy()


def view_with_gaps() -> Array:
    """Return an array that is in no order."""
    return Array((4,), gaps=True)


def on_another_device() -> Array:
    """Return an array of device 1."""
    return Array((4,), device=1)


class Driver:
    """What was done, and what is to go wrong: `error_in` names the call."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.functions: list[str] = []
        self.loaded: list[bytes] = []
        self.allowed: list[tuple[str, int]] = []
        self.made_current: list[int] = []
        self.error_in = ""
        self.status = 0
        self.driver_version = 13020
        self.clock_ms = 0.0

    def make(self) -> Any:
        """Return a `Gpu` on this driver."""
        from hpcnn.ops.cuda.gpu import Gpu

        return Gpu()

    def fail(self, where: str, error: Exception | None = None) -> None:
        """Raise if this is where something is to go wrong."""
        if self.error_in == where:
            raise error or DriverError("CUDA_ERROR")

    def count(self) -> int:
        """Return the number of devices."""
        if self.status:
            raise RuntimeError_(self.status)
        return 2

    def set_attribute(self, function: str, attribute: int, value: int) -> None:
        """Note how much shared memory is asked for."""
        assert attribute == 8
        self.fail("funcSetAttribute")
        self.allowed.append((function, value))

    def module(self) -> Any:
        """Return a module that loads anything."""

        def get_function(name: str) -> Any:
            self.fail("get_function")
            self.functions.append(name)
            return Function(self, name)

        return SimpleNamespace(load=self.loaded.append, get_function=get_function)

    def event(self) -> Any:
        """Return an event, which takes the time of the clock."""
        event = SimpleNamespace(time=0.0)
        event.record = lambda: setattr(event, "time", self.clock_ms)
        return event


class Constant:
    """An argument that holds the address of a number or structure."""

    def __init__(self, value: np.ndarray) -> None:
        assert isinstance(value, np.ndarray)
        self.value = value


class Function:
    """A kernel."""

    def __init__(self, driver: Driver, name: str) -> None:
        self.driver, self.ptr = driver, name

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: list[Any], shared_mem: int = 0) -> None:
        self.driver.fail("launch")
        self.driver.launches.append((self.ptr, grid, block, args, shared_mem))


def _copy(to: int, source: int, num_bytes: int, kind: int, stream: int) -> None:
    assert (kind, stream) == (1, 77)
    ctypes.memmove(to, source, num_bytes)


def install(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Let `import cupy` find the fake, and return what is behind it."""
    driver = Driver()
    monkeypatch.setattr(Array, "driver", driver, raising=False)
    properties = {"major": 9, "minor": 0, "multiProcessorCount": 132, "name": b"Fake GPU", "totalGlobalMem": 1000}
    stream = SimpleNamespace(ptr=77, synchronize=lambda: driver.fail("synchronize"))
    runtime = SimpleNamespace(
        CUDARuntimeError=RuntimeError_,
        getDeviceCount=driver.count,
        driverGetVersion=lambda: driver.driver_version,
        runtimeGetVersion=lambda: 13020,
        getDeviceProperties=lambda index: properties,
        memGetInfo=lambda: (100, 1000),
        memcpyAsync=_copy,
        memcpyHostToDevice=1,
    )
    cuda = SimpleNamespace(
        Device=lambda: SimpleNamespace(id=0, use=lambda: driver.made_current.append(threading.get_ident())),
        Event=driver.event,
        driver=SimpleNamespace(
            CUDADriverError=DriverError,
            funcSetAttribute=driver.set_attribute,
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        ),
        function=SimpleNamespace(Module=driver.module, CNumpyArray=Constant),
        get_current_stream=lambda: stream,
        get_elapsed_time=lambda before, after: after.time - before.time,
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        runtime=runtime,
    )
    cupy: Any = ModuleType("cupy")
    cupy.cuda, cupy.ndarray, cupy.__version__ = cuda, Array, "14.0.0"
    cupy.get_default_memory_pool = lambda: SimpleNamespace(free_bytes=lambda: 10)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return driver
