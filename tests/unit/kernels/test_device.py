"""The contract of `hpcnn.ops.cuda.device.Device`, on the emulation and on a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from hpcnn.errors import DeviceError
from hpcnn.ops.cuda import cache, compile, types
from tests.emulation import build
from tests.emulation.emulator import Emulator

PROBES = Path(build.HERE) / "kernels"


@pytest.fixture
def probed(device, tmp_path, monkeypatch):
    """The device, with the tests' own kernels in place of the operators'."""
    if isinstance(device, Emulator):
        return Emulator(folders=[PROBES])
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for path in (*compile.folder().glob("*.cuh"), PROBES / "contract.cu"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(compile, "folder", lambda: tmp_path)
    return device


def test_arguments_arrive_as_the_kernel_declares_them(probed) -> None:
    out = probed.empty((6,), np.int32)
    numbers = types.conv2d((7, 1, 1, 4), (1, 1, 1, 2), (7, 1, 1, 1), stride=(1, 1), padding=((0, 0), (0, 0)),
                           dilation=(1, 1), groups=2)  # fmt: skip
    arguments = (out, None, np.int16(-3), numbers, np.float64(2.125), np.int64(5 << 32))
    probed.launch("contract", "contract_arguments", (1,), (32,), *arguments)
    assert [1, -3, 7, 2, 17, 5] == probed.download(out).tolist()


@pytest.mark.parametrize("num_bytes", [4 << 10, 48 << 10, 96 << 10])
def test_dynamic_shared_memory_may_be_large(num_bytes, probed, random) -> None:
    count = num_bytes // 4
    x = random.standard_normal((2, count)).astype(np.float32)
    y = probed.empty(x.shape, np.float32)
    arguments = (probed.upload(x), y, np.int32(count))
    probed.launch("contract", "contract_shared_f32", (2,), (256,), *arguments, shared_bytes=num_bytes)
    assert np.array_equal(probed.download(y), x[:, ::-1])


@pytest.mark.parametrize("arg", [1, 1.0, True, np.zeros(3, np.float32)[::2]])
def test_arguments_of_no_definite_type_are_refused(arg, device) -> None:
    with pytest.raises((TypeError, ValueError)):
        device.launch("delay", "delay", (1,), (1,), arg)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8, "bfloat16"])
def test_arrays_travel_unchanged(dtype, device, random) -> None:
    dtype = types.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    x = (100 * random.random((5, 3))).astype(dtype)
    for host in (x, x.T, x[::2], x[0, 0], x[:0]):
        there = device.upload(host)
        back = device.download(there)
        assert isinstance(back, np.ndarray)
        assert (back.shape, back.dtype) == (host.shape, dtype)
        assert np.array_equal(back, host)
        assert there.flags.c_contiguous
    assert device.upload(x, np.float32).dtype == np.float32


def test_empty_arrays_are_in_c_order(device) -> None:
    for dtype in (np.float32, types.bfloat16()):
        x = device.empty((3, 5), dtype)
        assert (x.shape, x.dtype, x.flags.c_contiguous) == ((3, 5), dtype, True)


@pytest.mark.gpu
def test_measurement_is_by_the_devices_clock(gpu) -> None:
    """Twice the cycles take twice as long, and short kernels are not measured by their launches."""

    def seconds(cycles: int) -> float:
        return gpu.measure(lambda: gpu.launch("delay", "delay", (1,), (1,), np.int64(cycles)), repeats=9)

    assert 1.8 < seconds(4_000_000) / seconds(2_000_000) < 2.2
    assert seconds(1_000) < 20e-6


@pytest.mark.gpu
def test_refused_launches_and_too_large_arrays_are_explained(gpu) -> None:
    with pytest.raises(DeviceError, match="kernel delay "):
        gpu.launch("delay", "delay", (1,), (2048,), np.int64(1))
    with pytest.raises(DeviceError, match="shared memory"):
        gpu.launch("delay", "delay", (1,), (1,), np.int64(1), shared_bytes=1 << 20)
    with pytest.raises(DeviceError, match=r"out of memory .* bytes were asked for"):
        gpu.empty((1 << 42,), np.float32)
    with pytest.raises(DeviceError, match=r"kernel nonsense of delay\.cu cannot be loaded"):
        gpu.launch("delay", "nonsense", (1,), (1,))
    gpu.launch("delay", "delay", (1,), (1,), np.int64(1))  # none of it broke the context
    gpu.synchronize()


@pytest.fixture
def gpu():
    """A GPU, or a skip that says why there is none."""
    pytest.importorskip("cupy", reason="kernels on a GPU need CuPy", exc_type=ImportError)
    from hpcnn.ops.cuda.gpu import Gpu

    try:
        return Gpu()
    except DeviceError as error:
        pytest.skip(str(error))
