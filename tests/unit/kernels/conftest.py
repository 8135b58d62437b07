"""Fixtures that run a test of a kernel on the emulation, and on a GPU where there is one."""

from __future__ import annotations

import os
import zlib
from contextlib import nullcontext

import numpy as np
import pytest

from hpcnn.errors import DeviceError
from hpcnn.ops import backend
from hpcnn.ops.cuda import device as devices
from hpcnn.ops.cuda import tuning
from tests.emulation import build
from tests.emulation.emulator import Emulator

EVERYTHING = "HPCNN_ALL_KERNEL_TESTS"
THINNED = ("test_conv2d_wgmma", "test_conv2d_wgmma_phases", "test_conv2d_halo")
ONE_IN = 5


def pytest_collection_modifyitems(config, items) -> None:
    """Emulate a fifth of the cases of the largest kernels, always the same one, unless HPCNN_ALL_KERNEL_TESTS is set.

    All of them take minutes. A GPU runs all.
    """
    if os.environ.get(EVERYTHING):
        return
    dropped = [
        item
        for item in items
        if item.path.stem in THINNED
        and "gpu" not in item.keywords
        and hasattr(item, "callspec")
        and zlib.crc32(item.name.encode()) % ONE_IN
    ]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


def emulator(**settings) -> Emulator:
    """Return an emulator, or skip where there is no compiler for it."""
    if build.COMPILER is None:
        pytest.skip("the emulation of kernels needs g++")
    return Emulator(**settings)


@pytest.fixture(params=["emulation", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A device to launch kernels on, in use by `hpcnn.ops.cuda`; the emulation takes another order at every launch.

    Kernels are chosen by the order in which they are offered, the same on both: the emulation's clock says nothing.
    """
    monkeypatch.setenv(tuning.VARIABLE, "off")
    if request.param == "emulation":
        chosen = emulator()
    else:
        pytest.importorskip("cupy", reason="kernels on a GPU need CuPy", exc_type=ImportError)
        gpu = pytest.importorskip("hpcnn.ops.cuda.gpu")
        try:
            chosen = gpu.Gpu()
        except DeviceError as error:
            pytest.skip(str(error))
    with devices.use(chosen):
        yield chosen


@pytest.fixture
def on_device(device):
    """The same, and `hpcnn.ops` computes on it: what a test uploads, and NumPy arrays where that is the emulation."""
    with backend.use("cuda") if isinstance(device, Emulator) else nullcontext():
        yield device


@pytest.fixture
def random():
    """A generator of reproducible numbers."""
    return np.random.default_rng(20)
