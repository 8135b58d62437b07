"""Which implementation serves which array, and what every implementation must offer."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.errors import ShapeError
from hpcnn.ops import backend, cpu, onednn

FLOAT32, FLOAT64 = np.zeros(1, np.float32), np.zeros(1)


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

    with pytest.raises(ShapeError, match=r"array of type .*Foreign; this version computes on NumPy arrays"):
        backend.implementation(Foreign())
    with pytest.raises(ShapeError, match="array of type int64; numbers must be float32 or float64"):
        backend.implementation(np.zeros(1, np.int64))


@pytest.mark.parametrize("name", cpu.__all__)
def test_implementations_offer_the_same_functions_with_the_same_parameters(name):
    expected = list(inspect.signature(getattr(cpu, name)).parameters)
    assert expected == list(inspect.signature(getattr(onednn, name)).parameters)
    assert expected == list(inspect.signature(getattr(ops, name)).parameters)


def test_every_operator_is_public():
    assert set(cpu.__all__) <= set(ops.__all__)
    assert [name for name in ops.__all__ if not hasattr(ops, name)] == []
