"""A GPU that is none, for what is above the kernels: its arrays are strict, its copies late.

`FakeArray` has the part of CuPy's array protocol that the code uses, and refuses to meet a host array, as CuPy's does.
`FakeCopies` stands for the copy stream: copies and kernels that are launched by it happen some polls later, each stream
in its order, the two in any. What the code would get wrong on a GPU for lack of an event, it gets wrong here.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcnn.ops import backend, cpu
from hpcnn.ops import update as host_update
from hpcnn.ops.cuda import device as devices
from hpcnn.ops.cuda import update as cuda_update
from tests.emulation.emulator import Emulator


class FakeArray:
    """An array that is reached from the host by `get` and `set` alone."""

    __array_ufunc__ = None
    __cuda_array_interface__ = "for those who ask whether this is a device array"

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    shape = property(lambda self: self.memory.shape)
    dtype = property(lambda self: self.memory.dtype)
    size = property(lambda self: self.memory.size)
    ndim = property(lambda self: self.memory.ndim)
    nbytes = property(lambda self: self.memory.nbytes)
    itemsize = property(lambda self: self.memory.itemsize)
    flags = property(lambda self: self.memory.flags)
    data = property(lambda self: SimpleNamespace(ptr=self.memory.ctypes.data))
    T = property(lambda self: FakeArray(self.memory.T))

    def __len__(self) -> int:
        return len(self.memory)

    def get(self) -> np.ndarray:
        return self.memory.copy()

    def set(self, x: np.ndarray) -> None:
        assert isinstance(x, np.ndarray)
        assert (x.dtype, x.shape) == (self.dtype, self.shape)
        assert self.flags.c_contiguous
        assert x.flags.c_contiguous
        self.memory[...] = x

    def reshape(self, *shape: Any) -> FakeArray:
        return FakeArray(self.memory.reshape(*shape))

    def astype(self, dtype: Any, copy: bool = True) -> FakeArray:
        return FakeArray(self.memory.astype(dtype, copy=copy))

    def fill(self, value: float) -> None:
        self.memory.fill(value)

    def copy(self) -> FakeArray:
        return FakeArray(self.memory.copy())

    def sum(self, axis: int | tuple[int, ...], dtype: Any = None, out: FakeArray | None = None) -> FakeArray:
        return FakeArray(self.memory.sum(axis, dtype, None if out is None else out.memory))

    def __getitem__(self, where: Any) -> FakeArray:
        found = self.memory[where]
        return FakeArray(found if isinstance(found, np.ndarray) else np.asarray(found))

    def __setitem__(self, where: Any, value: Any) -> None:
        self.memory[where] = _own(value)

    def __add__(self, other: Any) -> FakeArray:
        return FakeArray(np.asarray(self.memory + _own(other)))

    def __sub__(self, other: Any) -> FakeArray:
        return FakeArray(np.asarray(self.memory - _own(other)))

    def __mul__(self, other: Any) -> FakeArray:
        return FakeArray(np.asarray(self.memory * _own(other)))

    def __truediv__(self, other: Any) -> FakeArray:
        return FakeArray(np.asarray(self.memory / _own(other)))

    __rmul__ = __mul__

    def __pow__(self, other: Any) -> FakeArray:
        return FakeArray(np.asarray(self.memory ** _own(other)))

    def __iadd__(self, other: Any) -> FakeArray:
        np.add(self.memory, _own(other), out=self.memory, casting="same_kind")
        return self

    def __isub__(self, other: Any) -> FakeArray:
        np.subtract(self.memory, _own(other), out=self.memory, casting="same_kind")
        return self

    def __imul__(self, other: Any) -> FakeArray:
        np.multiply(self.memory, _own(other), out=self.memory, casting="same_kind")
        return self


FakeArray.__module__ = "cupy"


def _own(value: Any) -> Any:
    """Return what an array may be computed with: another one, or a number."""
    if isinstance(value, FakeArray):
        return value.memory
    assert np.isscalar(value), f"a device array meets {type(value)}"
    return value


def on_device(x: np.ndarray) -> FakeArray:
    """Return a copy of a host array."""
    return FakeArray(np.array(x))


class _Event:
    def __init__(self, copies: FakeCopies) -> None:
        self.copies, self.passed = copies, False

    @property
    def done(self) -> bool:
        self.copies.tick()
        return self.passed


class FakeCopies:
    """See `hpcnn.gpu.Copies`. Two queues, of kernels and of copies, that get on by a few entries now and then."""

    def __init__(self, seed: int, pace: float = 0.3) -> None:
        self.draw = np.random.default_rng(seed)
        self.pace = pace
        self.kernels: deque[Callable[[], None]] = deque()
        self.copies: deque[tuple[int, Callable[[], None]]] = deque()  # behind so many kernels
        self.num_launched = self.num_run = 0
        self.bytes_down = self.bytes_up = 0

    def launch(self, kernel: Callable[[], None]) -> None:
        """Put a kernel in the compute stream."""
        self.kernels.append(kernel)
        self.num_launched += 1

    def locked(self, count: int, dtype: Any) -> np.ndarray:
        memory = np.empty(count, dtype)
        memory.fill(77)
        return memory

    def after_kernels(self) -> None:
        self._copy(lambda: None, self.num_launched)

    def download(self, source: FakeArray, target: np.ndarray) -> None:
        assert source.flags.c_contiguous
        assert source.nbytes == target.nbytes
        self.bytes_down += target.nbytes
        self._copy(lambda: np.copyto(target, source.memory.reshape(target.shape)))

    def upload(self, source: np.ndarray, target: FakeArray) -> None:
        assert target.flags.c_contiguous
        assert source.nbytes == target.nbytes
        self.bytes_up += source.nbytes
        self._copy(lambda: np.copyto(target.memory, source.reshape(target.shape)))

    def beside(self, action: Callable[[int], None]) -> None:
        self._copy(lambda: action(0))

    def event(self) -> _Event:
        event = _Event(self)
        self._copy(lambda: setattr(event, "passed", True))
        return event

    def before_kernels(self, event: _Event) -> None:
        while not event.passed:  # the compute stream is at a standstill meanwhile
            self.tick()

    def tick(self) -> None:
        """Let some time pass on the device."""
        if self.kernels and self.draw.random() < self.pace:
            self.kernels.popleft()()
            self.num_run += 1
        if self.copies and self.draw.random() < self.pace:
            num_kernels, action = self.copies[0]
            if self.num_run >= num_kernels:
                self.copies.popleft()
                action()

    def _copy(self, action: Callable[[], None], num_kernels: int = 0) -> None:
        self.copies.append((num_kernels, action))


class _Operators(ModuleType):
    """The operators of the CPU on fake arrays."""

    def __getattr__(self, name: str) -> Any:
        return _on_fakes(getattr(cpu, name))


def _on_fakes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of host arrays as one of fake arrays."""

    def run(*args: Any, **options: Any) -> Any:
        plain = {name: _host(value) for name, value in options.items()}
        return _device(function(*map(_host, args), **plain))

    return run


def _host(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_host, value))
    return value.memory if isinstance(value, FakeArray) else value


def _device(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_device, value))
    return FakeArray(value) if isinstance(value, np.ndarray) else value


def _empty(shape: Any, dtype: Any = float) -> FakeArray:
    memory = np.empty(shape, dtype)
    memory.fill(np.nan if memory.dtype.kind == "f" else 1)
    return FakeArray(memory)


UPDATES = ("sgd_update", "adam_update", "lars_update", "squared_norm")


@contextmanager
def _fake_cupy() -> Iterator[pytest.MonkeyPatch]:
    """Have fake arrays in CuPy's place inside a `with` block."""
    module = ModuleType("cupy")
    module.empty = _empty  # type: ignore[attr-defined]
    module.ascontiguousarray = lambda x: FakeArray(np.ascontiguousarray(x.memory))  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", module)
        patch.setattr("hpcnn.cli.gpus._properties", list)  # there is no GPU to describe
        yield patch


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Have fake arrays in CuPy's place inside a `with` block, and the CPU's operators on them."""
    with _fake_cupy() as patch, backend.use("numpy"):
        patch.setattr(backend, "_cuda", _Operators("hpcnn.ops.cuda"))
        for name in UPDATES:
            patch.setattr(cuda_update, name, _on_fakes(getattr(host_update, name)))
        yield


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Have fake arrays in CuPy's place inside a `with` block, and emulated kernels."""
    with _fake_cupy(), devices.use(EmulatedGpu()):
        yield


class EmulatedGpu(Emulator):
    """An emulator for fake arrays: the operators of `hpcnn.ops.cuda` as they are, down to the kernels."""

    def empty(self, shape: Any, dtype: Any) -> FakeArray:
        return FakeArray(super().empty(shape, dtype))

    def upload(self, x: Any, dtype: Any = None) -> FakeArray:
        assert not isinstance(x, FakeArray)
        return FakeArray(np.array(x, dtype))

    def download(self, x: FakeArray) -> np.ndarray:
        return x.get()

    def launch(self, source: str, kernel: str, grid: Any, block: Any, *args: Any, shared_bytes: int = 0) -> None:
        assert not any(isinstance(arg, np.ndarray) and arg.dtype.fields is None for arg in args)
        super().launch(source, kernel, grid, block, *map(_host, args), shared_bytes=shared_bytes)
