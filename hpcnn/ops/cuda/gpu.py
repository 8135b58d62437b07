"""A GPU through CuPy: memory from its pool, copies on its stream, and kernels from `kernels/` by name.

`HPCNN_CUDA_DEBUG=1` waits for each kernel and checks all its arguments, so that an error names the kernel it is from.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Shape
from hpcnn.errors import DeviceError
from hpcnn.ops.cuda import compile
from hpcnn.ops.cuda.device import GIVEN

DEBUG = "HPCNN_CUDA_DEBUG"
DEFAULT_SHARED_BYTES = 48 << 10
"""A kernel gets this much shared memory without asking."""
NULL = np.uint64(0)
MAX_STRUCTURES = 1 << 13
"""Structures whose addresses are remembered."""
INSTALL = "`pip install 'hpcnn[cuda13]'` (or 'hpcnn[cuda12]' where the driver is older than 580)"
# CUDA's numbers of errors.
INSUFFICIENT_DRIVER = 35
CYCLES_PER_SECOND = 2e9
"""Clock of a GPU, roughly: how long `delay` is to spin."""
LONGEST_DELAY_S = 0.02


class Gpu:
    """The device that CuPy has current when this is made; used by every thread that calls.

    Attributes
    ----------
    architecture, num_processors, name
        See `hpcnn.ops.cuda.device.Device`.
    index : int
        CUDA's number of the device in this process.

    Raises
    ------
    DeviceError
        If there is no CuPy, no GPU, or the driver is too old.
    """

    def __init__(self) -> None:
        self._cupy = cupy = load()
        self._device = cupy.cuda.Device()
        self.index: int = self._device.id
        properties = cupy.cuda.runtime.getDeviceProperties(self.index)
        self.architecture = 10 * int(properties["major"]) + int(properties["minor"])
        self.num_processors = int(properties["multiProcessorCount"])
        self.name = bytes(properties["name"]).decode()
        self._errors = (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError)
        self._debug = os.environ.get(DEBUG, "0") not in ("", "0")
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], Any] = {}
        self._checked: dict[tuple[Any, ...], Any] = {}
        self._shared: dict[tuple[str, str], int] = {}
        self._ndarray = cupy.ndarray
        # CuPy takes 6 us to find the address of a structure. Kept by identity, with the structure, which lives so long.
        self._structures: dict[int, tuple[np.ndarray, Any]] = {}
        self._null = self._constant(NULL)
        self._local = threading.local()

    def empty(self, shape: Shape, dtype: Any) -> Array:
        """Return an uninitialised C-ordered array.

        Raises
        ------
        DeviceError
            If there is not enough memory.
        """
        if not hasattr(self._local, "ready"):
            self._make_current()
        try:
            return self._ndarray(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError:
            raise self._out_of_memory(shape, dtype) from None
        except self._errors as error:
            raise self._earlier(error) from None

    def scratch(self, count: int, dtype: Any) -> Array:
        """Return elements of this thread's own that the next call for this type may return too; see `Device`."""
        try:
            found = self._local.scratch.get(dtype)
        except AttributeError:
            self._local.scratch, found = {}, None
        if found is None or found.size < count:
            found = self._local.scratch[dtype] = self.empty((count,), dtype)
        return found

    def upload(self, x: Any, dtype: Any = None) -> Array:
        """Return a copy of a host array on this device, in the order of the current stream.

        The contents of pinned memory may still be read after this returns: do not change them before the work that
        was queued with it is done.
        """
        host = np.ascontiguousarray(x, dtype).reshape(np.shape(x))
        y = self.empty(host.shape, host.dtype)
        runtime = self._cupy.cuda.runtime
        if host.nbytes:
            stream = self._cupy.cuda.get_current_stream().ptr
            try:
                runtime.memcpyAsync(y.data.ptr, host.ctypes.data, host.nbytes, runtime.memcpyHostToDevice, stream)
            except self._errors as error:
                raise self._earlier(error) from None
        return y

    def download(self, x: Array) -> np.ndarray:
        """Return a copy of an array as a NumPy array, having waited for what makes it."""
        self._make_current()
        try:
            host: np.ndarray = x.get()
        except self._errors as error:
            raise self._earlier(error) from None
        return host

    def launch(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        *args: Any,
        shared_bytes: int = 0,
    ) -> None:
        """Start a kernel; see `Device.launch`.

        Types of arguments are checked whenever a kernel meets a combination of them for the first time, extents and
        order of arrays then too; with HPCNN_CUDA_DEBUG=1, always.

        Raises
        ------
        DeviceError
            If the kernel cannot be compiled, or CUDA refuses it.
        TypeError, ValueError
            If an argument is of a kind that kernels cannot take.
        """
        signature = (source, kernel, *map(type, args))
        function = self._checked.get(signature)
        if function is None or self._debug:
            function = self._first(signature, args)
        self._make_current()
        if shared_bytes > DEFAULT_SHARED_BYTES and shared_bytes > self._shared.get((source, kernel), 0):
            self._allow_shared(source, kernel, function, shared_bytes)
        try:
            function(tuple(grid), tuple(block), [self._passed(arg) for arg in args], shared_bytes)
            if self._debug:
                self._cupy.cuda.get_current_stream().synchronize()
        except self._errors as error:
            raise self._failed(source, kernel, grid, block, shared_bytes, error) from None

    def prepare(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        *args: Any,
        shared_bytes: int = 0,
    ) -> Callable[..., None]:
        """Return a launch that is ready but for what is `GIVEN`; see `Device.prepare`.

        Arguments are checked at the first call; with HPCNN_CUDA_DEBUG=1, always.
        """
        grid, block = tuple(grid), tuple(block)
        places = [place for place, arg in enumerate(args) if arg is GIVEN]
        template = [None if arg is GIVEN else self._constant(arg) for arg in args]
        array, local, null, passed = self._ndarray, self._local, self._null, self._passed
        function: Any = None

        def first(given: Sequence[Any]) -> None:
            whole = list(args)
            for place, arg in zip(places, given, strict=True):
                whole[place] = arg
            self.launch(source, kernel, grid, block, *whole, shared_bytes=shared_bytes)

        def start(*given: Any) -> None:
            nonlocal function
            if function is None or not hasattr(local, "ready"):
                first(given)
                function = None if self._debug else self._functions[source, kernel]
                return
            full = template.copy()
            for place, arg in zip(places, given, strict=True):
                full[place] = arg if type(arg) is array else null if arg is None else passed(arg)
            try:
                function(grid, block, full, shared_bytes)
            except self._errors as error:
                raise self._failed(source, kernel, grid, block, shared_bytes, error) from None

        return start

    def _passed(self, arg: Any) -> Any:
        """Return an argument as CuPy takes it without delay."""
        if arg is None:
            return self._null
        if type(arg) is not np.ndarray:
            return arg
        found = self._structures.get(id(arg))
        if found is None:
            if len(self._structures) >= MAX_STRUCTURES:
                self._structures.clear()
            found = self._structures[id(arg)] = arg, self._constant(arg)
        return found[1]

    def _constant(self, arg: Any) -> Any:
        """Return a NumPy scalar or a structure as CuPy's own argument, which holds its address; others as they are."""
        if isinstance(arg, np.generic):
            arg = np.asarray(arg)
        return self._cupy.cuda.function.CNumpyArray(arg) if isinstance(arg, np.ndarray) else arg

    def _failed(
        self, source: str, kernel: str, grid: Sequence[int], block: Sequence[int], shared_bytes: int, error: Exception
    ) -> DeviceError:
        """Return what to raise where CUDA refuses a launch."""
        sizes = f"grid {tuple(grid)}, block {tuple(block)}, {shared_bytes} bytes of shared memory"
        return DeviceError(
            f"gpu: kernel {kernel} ({source}.cu; {sizes}) failed on {self.name}: {error}. "
            f"{'Report it.' if self._debug else f'Set {DEBUG}=1 to see whether an earlier kernel is to blame.'}"
        )

    def synchronize(self) -> None:
        """Wait for all that was started on the current stream.

        Raises
        ------
        DeviceError
            If some of it failed.
        """
        self._make_current()
        try:
            self._cupy.cuda.get_current_stream().synchronize()
        except self._errors as error:
            raise self._earlier(error) from None

    def measure(self, run: Any, repeats: int = 5) -> float:
        """Return the median duration of `run()` in seconds, by events on the stream; it has run once before.

        The stream is kept busy while Python queues the repeats, so that kernels shorter than their launch are not
        measured by how fast Python is.
        """
        run()
        self.synchronize()
        started = time.perf_counter()
        run()
        queueing = repeats * (time.perf_counter() - started + 20e-6)
        self.synchronize()
        events = [(self._cupy.cuda.Event(), self._cupy.cuda.Event()) for _ in range(repeats)]
        cycles = np.int64(CYCLES_PER_SECOND * min(1.5 * queueing, LONGEST_DELAY_S))
        self.launch("delay", "delay", (1,), (1,), cycles)
        for before, after in events:
            before.record()
            run()
            after.record()
        self.synchronize()
        elapsed = self._cupy.cuda.get_elapsed_time
        return 1e-3 * statistics.median(elapsed(before, after) for before, after in events)

    def _make_current(self) -> None:
        """Make this device current in a thread that calls for the first time: CUDA starts each with device 0."""
        if not hasattr(self._local, "ready"):
            self._device.use()
            self._local.ready = True

    def _first(self, signature: tuple[Any, ...], args: Sequence[Any]) -> Any:
        """Check the arguments of a kernel, find its function, and remember both."""
        source, kernel = signature[:2]
        for position, arg in enumerate(args):
            self._check(kernel, position, arg)
        function = self._functions.get((source, kernel))
        if function is None:
            function = self._functions[source, kernel] = self._load(source, kernel)
        self._checked[signature] = function
        return function

    def _check(self, kernel: str, position: int, arg: Any) -> None:
        """Raise unless kernels can take this argument."""
        who = f"gpu: kernel {kernel}: argument {position}"
        if isinstance(arg, self._cupy.ndarray):
            if arg.device.id != self.index:
                raise ValueError(f"{who} is on device {arg.device.id}; this is device {self.index}.")
            if not (arg.flags.c_contiguous or arg.flags.f_contiguous):
                raise ValueError(f"{who} is a view with gaps.")
        elif isinstance(arg, np.ndarray):
            if arg.shape or arg.dtype.fields is None:
                raise TypeError(f"{who} is a host array (of {arg.dtype}); only structures without axes are passed.")
        elif arg is not None and not isinstance(arg, np.generic):
            raise TypeError(f"{who} is a {type(arg).__name__}; it must be a NumPy scalar, a structure, array or None.")

    def _load(self, source: str, kernel: str) -> Any:
        """Return the function of a kernel, having compiled and loaded its file if need be."""
        self._make_current()
        try:
            if source not in self._modules:
                module = self._cupy.cuda.function.Module()
                module.load(compile.cubin(source, self.architecture))
                self._modules[source] = module
            return self._modules[source].get_function(kernel)
        except self._errors as error:
            raise DeviceError(
                f"gpu: kernel {kernel} of {source}.cu cannot be loaded on {self.name} (sm_{self.architecture}): "
                f"{error}. Is the driver older than the CUDA of CuPy? {INSTALL}"
            ) from None

    def _allow_shared(self, source: str, kernel: str, function: Any, num_bytes: int) -> None:
        """Let a kernel have more dynamic shared memory than all have from the start."""
        driver = self._cupy.cuda.driver
        try:
            driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, num_bytes)
        except self._errors as error:
            raise DeviceError(
                f"gpu: kernel {kernel} ({source}.cu) needs {num_bytes} bytes of shared memory, more than {self.name} "
                f"has: {error}. Report it: another kernel should have been chosen."
            ) from None
        self._shared[source, kernel] = num_bytes

    def _out_of_memory(self, shape: Shape, dtype: Any) -> DeviceError:
        wanted = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        free, total = self._cupy.cuda.runtime.memGetInfo()
        unused = self._cupy.get_default_memory_pool().free_bytes()
        return DeviceError(
            f"gpu: out of memory on {self.name}: {wanted} bytes were asked for, {free} are free and {unused} in pieces "
            f"too small, of {total}. Choose a smaller train.global_batch, compute in "
            "bf16, or start more ranks on more GPUs."
        )

    def _earlier(self, error: Exception) -> DeviceError:
        """Return what to raise where work that was started before turns out to have failed."""
        return DeviceError(
            f"gpu: {self.name} failed, in this or in something started before: {error}. "
            f"Set {DEBUG}=1 to see in which kernel."
        )


def load() -> Any:
    """Return CuPy, having seen that it has a GPU to work with.

    Raises
    ------
    DeviceError
        If there is no CuPy, no GPU, or the driver is too old.
    """
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(f"gpu: CuPy cannot be imported ({error}). {INSTALL} installs it.") from None
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        has = runtime.driverGetVersion()
        if error.status == INSUFFICIENT_DRIVER and has:
            raise DeviceError(
                f"gpu: the driver is for CUDA {version(has)}, CuPy for {version(runtime.runtimeGetVersion())}. Install "
                f"the one that fits, {INSTALL}, in a fresh environment, or a newer driver."
            ) from None
        why = str(error) if has else "no NVIDIA driver"
        raise DeviceError(f"gpu: no GPU can be used here ({why}). {_ELSEWHERE}") from None
    if not count:
        raise DeviceError(f"gpu: CUDA sees no GPU here. {_ELSEWHERE}")
    return cupy


def version(number: int) -> str:
    """Return CUDA's version as people write it: 13020 -> "13.2"."""
    return f"{number // 1000}.{number % 1000 // 10}"


_ELSEWHERE = "Ask Slurm for one (--gpus-per-node), look at CUDA_VISIBLE_DEVICES and `nvidia-smi`, or train on CPUs."
