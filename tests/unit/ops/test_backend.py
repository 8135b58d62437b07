"""Which implementation serves which array, and what every implementation must offer."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.errors import ShapeError
from hpcnn.ops import backend, check, cpu, cuda, onednn
from hpcnn.ops.cuda import device, types

FLOAT32, FLOAT64 = np.zeros(1, np.float32), np.zeros(1)
BFLOAT16 = np.zeros(1, types.bfloat16())


class GpuArray:
    """Stands for an array of CuPy's, of which the backend looks at the class's module and the element type only."""

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)


GpuArray.__module__ = "cupy"


class NamedDevice:
    """A device that has a name."""

    name, architecture = "GPU", 90


def test_float64_is_always_served_by_numpy(implementation):
    assert backend.implementation(FLOAT64) is cpu


def test_use_decides_who_serves_float32_and_gives_back(monkeypatch):
    monkeypatch.setattr(backend, "_float32", onednn)
    with backend.use("numpy") as chosen:
        assert backend.implementation(FLOAT32) is chosen is cpu
        assert backend.name() == f"numpy {np.__version__}"
    assert backend.implementation(FLOAT32) is onednn


def test_use_gives_back_after_an_error(monkeypatch):
    monkeypatch.setattr(backend, "_float32", onednn)
    with pytest.raises(KeyError), backend.use("numpy"):
        raise KeyError
    assert backend.implementation(FLOAT32) is onednn


def test_onednn_is_named_with_its_version():
    if not onednn.available():
        pytest.skip("the oneDNN library is not installed (pip install 'hpcnn[onednn]') or is switched off")
    with backend.use("onednn"):
        assert backend.implementation(FLOAT32) is onednn
        assert backend.name().startswith("onednn 3.")


def test_numpy_serves_when_the_library_is_not_there(monkeypatch):
    monkeypatch.setattr(backend, "_float32", None)
    monkeypatch.setattr(onednn, "available", lambda: False)
    assert backend.implementation(FLOAT32) is cpu
    with pytest.raises(RuntimeError, match="oneDNN was asked for but its library was not found"), backend.use("onednn"):
        pass
    assert backend.implementation(FLOAT32) is cpu


def test_the_environment_switches_onednn_off(monkeypatch):
    monkeypatch.setattr(backend, "_float32", None)
    monkeypatch.setattr(onednn, "available", lambda: True)
    monkeypatch.setenv("HPCNN_ONEDNN", "off")
    assert backend.implementation(FLOAT32) is cpu


def test_the_library_is_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(backend, "_float32", None)
    monkeypatch.setattr(onednn, "available", lambda: asked.append(1) is not None)
    monkeypatch.delenv("HPCNN_ONEDNN", raising=False)
    for _ in range(3):
        backend.implementation(FLOAT32)
    assert [1] == asked


def test_other_arrays_and_numbers_are_refused():
    class Foreign:
        """Stands for an array of another framework."""

    with pytest.raises(ShapeError, match=r"array of type .*Foreign; arrays must be NumPy's or CuPy's"):
        backend.implementation(Foreign())
    with pytest.raises(ShapeError, match="array of type int64; numbers must be float32, float64 or bfloat16"):
        backend.implementation(np.zeros(1, np.int64))


@pytest.mark.parametrize("dtype", [np.float32, types.bfloat16()])
def test_arrays_of_a_gpu_are_served_by_cuda_whoever_serves_the_host(dtype, implementation, monkeypatch):
    monkeypatch.setattr(backend, "_cuda", None)
    for _ in range(2):
        assert backend.implementation(GpuArray(dtype)) is cuda


def test_float64_on_a_gpu_is_sent_to_the_cpu():
    with pytest.raises(ShapeError, match=r"CuPy array of type float64; .* float64 runs on the CPU"):
        backend.implementation(GpuArray(np.float64))


def test_bfloat16_is_served_by_who_serves_float32(implementation):
    assert backend.implementation(BFLOAT16) is backend.implementation(FLOAT32)


def test_use_cuda_serves_arrays_of_the_host_and_gives_back(implementation):
    before = backend.implementation(FLOAT32)
    with backend.use("cuda") as chosen:
        assert chosen is cuda
        assert backend.implementation(FLOAT32) is backend.implementation(BFLOAT16) is cuda
        assert backend.implementation(FLOAT64) is cpu
        with device.use(NamedDevice()):
            assert backend.name() == "cuda on GPU (sm_90)"
            assert backend.device_name() == "GPU (sm_90)"
    assert backend.implementation(FLOAT32) is backend.implementation(BFLOAT16) is before


@pytest.mark.parametrize(("x", "expected"), [(FLOAT32, np.float32), (FLOAT64, np.float64), (BFLOAT16, np.float32)])
def test_parameters_are_float32_beside_bfloat16(x, expected):
    assert check.parameter_dtype(x) == np.dtype(expected)


def test_operators_want_float32_parameters_beside_bfloat16(monkeypatch):
    """Arguments of each operator with parameters pass the checks, and parameters of bfloat16 do not."""
    for name in cuda.__all__:
        monkeypatch.setattr(cuda, name, lambda *arguments, **options: "served")
    half, single = types.bfloat16(), np.float32
    x, matrix, grad = np.zeros((1, 4, 4, 2), half), np.zeros((1, 2), half), np.zeros((1, 4, 4, 3), half)
    statistics = np.zeros(2)
    calls = [
        lambda t: ops.conv2d_forward(x, np.zeros((3, 1, 1, 2), t), np.zeros(3, t)),
        lambda t: ops.conv2d_backward_input(grad, np.zeros((3, 1, 1, 2), t), (4, 4)),
        lambda t: ops.conv2d_backward_weight(x, grad, (1, 1), out=(np.zeros((3, 1, 1, 2), t), np.zeros(3, t))),
        lambda t: ops.linear_forward(matrix, np.zeros((3, 2), t), np.zeros(3, t)),
        lambda t: ops.linear_backward_input(np.zeros((1, 3), half), np.zeros((3, 2), t)),
        lambda t: ops.linear_backward_weight(matrix, np.zeros((1, 3), half), out=(np.zeros((3, 2), t), np.zeros(3, t))),
        lambda t: ops.batchnorm_forward(x, np.zeros(2, t), np.zeros(2, t), epsilon=1e-5),
        lambda t: ops.batchnorm_backward(x, x, np.zeros(2, t), statistics, statistics, None, epsilon=1e-5),
    ]
    with backend.use("cuda"):
        for call in calls:
            assert call(single) == "served"
            with pytest.raises(ShapeError, match="must be float32"):
                call(half)


@pytest.mark.parametrize("name", cpu.__all__)
def test_implementations_offer_the_same_functions_with_the_same_parameters(name):
    expected = list(inspect.signature(getattr(cpu, name)).parameters)
    assert expected == list(inspect.signature(getattr(onednn, name)).parameters)
    assert expected == list(inspect.signature(getattr(cuda, name)).parameters)
    assert expected == list(inspect.signature(getattr(ops, name)).parameters)


def test_every_operator_is_public():
    assert set(cpu.__all__) <= set(ops.__all__)
    assert [name for name in ops.__all__ if not hasattr(ops, name)] == []
