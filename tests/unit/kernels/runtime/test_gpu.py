"""The GPU behind CuPy: launches, memory and errors, with a CuPy of the tests' own."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hpcnn.errors import DeviceError
from hpcnn.ops.cuda.device import GIVEN
from hpcnn.ops.cuda.gpu import load
from tests.unit.kernels.runtime import fake_cupy
from tests.unit.kernels.runtime.fake_compiler import Counting


def test_gpu_knows_itself(gpu: fake_cupy.Driver) -> None:
    found = gpu.make()
    assert (found.name, found.architecture, found.num_processors, found.index) == ("Fake GPU", 90, 132, 0)


def test_arrays_travel_both_ways(gpu: fake_cupy.Driver) -> None:
    found = gpu.make()
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for host in (x, x.T, x[0, 0], np.empty((0, 3), np.float32)):
        there = found.upload(host)
        back = found.download(there)
        assert (back.shape, back.dtype) == (host.shape, host.dtype)
        assert np.array_equal(back, host)
    assert found.upload(x, np.float64).dtype == np.float64
    assert found.empty((2, 5), np.float32).shape == (2, 5)


def test_launch_compiles_and_loads_once_and_passes_null_for_none(gpu: fake_cupy.Driver, compiler: Counting) -> None:
    found = gpu.make()
    x = found.empty((4,), np.float32)
    structure = np.array((1, 2), [("a", np.int32), ("b", np.int32)])
    for _ in range(3):
        found.launch("plain", "add_f32", [2], (128, 1), x, None, np.int32(3), structure)
    found.launch("plain", "mul_f32", (2, 3), (64,), x)
    assert [call[0] for call in compiler.calls()] == ["plain"]
    assert gpu.loaded == [b"code of plain for 90a"]
    assert gpu.functions == ["add_f32", "mul_f32"]
    name, grid, block, args, shared = gpu.launches[0]
    assert (name, grid, block, shared) == ("add_f32", (2,), (128, 1), 0)
    assert args[0] is x
    assert (args[1].value.dtype, int(args[1].value)) == (np.uint64, 0)
    assert args[3].value is structure
    assert len(gpu.launches) == 4


def test_prepared_launch_takes_what_is_given_in_its_place(gpu: fake_cupy.Driver) -> None:
    found = gpu.make()
    x, structure = found.empty((4,), np.float32), np.array((1, 2), [("a", np.int32), ("b", np.int32)])
    number = np.int32(3)
    launch = found.prepare("plain", "k", [2], (64,), GIVEN, number, GIVEN, GIVEN, shared_bytes=64 << 10)
    assert gpu.launches == []
    for _ in range(3):
        launch(x, None, structure)
    launch(x, structure, None)
    assert gpu.allowed == [("k", 64 << 10)]
    assert gpu.functions == ["k"]
    for name, grid, block, args, shared in gpu.launches:
        assert (name, grid, block, shared, args[0]) == ("k", (2,), (64,), 64 << 10, x)
        assert getattr(args[1], "value", args[1]) == number
    assert [args[2].value is structure for _, _, _, args, _ in gpu.launches] == [False, False, False, True]
    assert gpu.launches[1][3][3].value is structure
    for given in ((x,), (x, None, structure, x)):
        with pytest.raises(ValueError, match="zip"):
            launch(*given)
    gpu.error_in = "launch"
    with pytest.raises(DeviceError, match=r"kernel k \(plain\.cu; grid \(2,\), block \(64,\), 65536 bytes"):
        launch(x, None, structure)


def test_prepared_launch_checks_its_arguments_at_first_and_in_each_thread(gpu: fake_cupy.Driver) -> None:
    found = gpu.make()
    launch = found.prepare("plain", "k", (1,), (1,), GIVEN)
    with pytest.raises(ValueError, match="argument 0 is a view with gaps"):
        launch(fake_cupy.view_with_gaps())
    x = found.empty((4,), np.float32)
    launch(x)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(launch, x).result()
    assert len(set(gpu.made_current)) == 2


def test_shared_memory_beyond_the_default_is_asked_for_once(gpu: fake_cupy.Driver) -> None:
    found = gpu.make()
    for num_bytes in (48 << 10, 64 << 10, 64 << 10, 60 << 10, 100 << 10):
        found.launch("plain", "k", (1,), (1,), shared_bytes=num_bytes)
    assert gpu.allowed == [("k", 64 << 10), ("k", 100 << 10)]
    gpu.error_in = "funcSetAttribute"
    with pytest.raises(DeviceError, match=r"kernel k \(plain\.cu\) needs 307200 bytes of shared memory"):
        found.launch("plain", "k", (1,), (1,), shared_bytes=300 << 10)


@pytest.mark.parametrize(
    ("arg", "kind", "message"),
    [
        (3, TypeError, "argument 1 is a int"),
        (0.5, TypeError, "argument 1 is a float"),
        (True, TypeError, "argument 1 is a bool"),
        (np.zeros(3, np.float32), TypeError, "argument 1 is a host array"),
        (np.array(1.0), TypeError, "argument 1 is a host array"),
        (fake_cupy.view_with_gaps(), ValueError, "argument 1 is a view with gaps"),
        (fake_cupy.on_another_device(), ValueError, "argument 1 is on device 1; this is device 0"),
    ],
)
def test_arguments_that_kernels_cannot_take_are_refused(
    arg: object, kind: type[Exception], message: str, gpu: fake_cupy.Driver
) -> None:
    found = gpu.make()
    for _ in range(2):
        with pytest.raises(kind, match=f"kernel k: {message}"):
            found.launch("plain", "k", (1,), (1,), np.int32(1), arg)
    assert gpu.launches == []


def test_python_number_is_refused_after_launches_that_were_right(gpu: fake_cupy.Driver) -> None:
    found = gpu.make()
    found.launch("plain", "k", (1,), (1,), np.int32(1))
    with pytest.raises(TypeError, match="argument 0 is a int"):
        found.launch("plain", "k", (1,), (1,), 1)


def test_failures_name_the_kernel(gpu: fake_cupy.Driver) -> None:
    found = gpu.make()
    gpu.error_in = "get_function"
    with pytest.raises(DeviceError, match=r"kernel nonsense of plain\.cu cannot be loaded on Fake GPU \(sm_90\)"):
        found.launch("plain", "nonsense", (1,), (1,))
    gpu.error_in = "launch"
    with pytest.raises(
        DeviceError, match=r"kernel k \(plain\.cu; grid \(1,\), block \(2,\), 0 bytes.*HPCNN_CUDA_DEBUG"
    ):
        found.launch("plain", "k", (1,), (2,))
    gpu.error_in = "get"
    with pytest.raises(DeviceError, match="in something started before"):
        found.download(found.empty((1,), np.float32))


def test_debugging_waits_for_each_kernel_and_checks_all_arguments(
    gpu: fake_cupy.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCNN_CUDA_DEBUG", "1")
    found = gpu.make()
    found.launch("plain", "k", (1,), (1,), found.empty((4,), np.float32))
    with pytest.raises(ValueError, match="view with gaps"):
        found.launch("plain", "k", (1,), (1,), fake_cupy.view_with_gaps())
    gpu.error_in = "synchronize"
    with pytest.raises(DeviceError, match="kernel k "):
        found.launch("plain", "k", (1,), (1,), found.empty((4,), np.float32))


def test_out_of_memory_says_how_much_and_what_to_do(gpu: fake_cupy.Driver) -> None:
    found = gpu.make()
    gpu.error_in = "ndarray"
    with pytest.raises(
        DeviceError, match=r"4000 bytes were asked for, 100 are free .* of 1000\. .*train\.global_batch"
    ):
        found.empty((10, 100), np.float32)


def test_measurement_is_the_median_of_runs_that_are_warm(gpu: fake_cupy.Driver, kernels: Path) -> None:
    (kernels / "delay.cu").write_text("// delay\n")
    found = gpu.make()
    durations = iter([100.0, 50.0, 3.0, 1.0, 9.0])  # milliseconds; the first two are not measured

    def run() -> None:
        gpu.clock_ms += next(durations)

    assert found.measure(run, repeats=3) == pytest.approx(3e-3)


def test_threads_make_the_device_current(gpu: fake_cupy.Driver) -> None:
    found = gpu.make()
    found.empty((1,), np.float32)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            pool.submit(found.empty, (1,), np.float32).result()
    assert len(set(gpu.made_current)) == len(gpu.made_current) == 2


@pytest.mark.parametrize(
    ("status", "driver", "message"),
    [
        (35, 12040, r"driver is for CUDA 12\.4, CuPy for 13\.2\. .*hpcnn\[cuda12\]"),
        (35, 0, r"no NVIDIA driver\)\. Ask Slurm"),
        (100, 13000, r"no GPU can be used here \(.*100.*\)\. Ask Slurm"),
    ],
)
def test_gpu_that_cannot_be_used_is_explained(status: int, driver: int, message: str, gpu: fake_cupy.Driver) -> None:
    gpu.status, gpu.driver_version = status, driver
    with pytest.raises(DeviceError, match=message):
        gpu.make()


def test_missing_cupy_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"CuPy cannot be imported .*pip install 'hpcnn\[cuda13\]'"):
        load()
