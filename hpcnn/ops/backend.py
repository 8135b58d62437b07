"""Which implementation serves an array: oneDNN for float32 where its library loads, plain NumPy otherwise.

The choice is made once, at the first call, so that importing `hpcnn.ops` costs nothing. `HPCNN_ONEDNN=off` forces
NumPy, `HPCNN_ONEDNN=path` names the library to load (see `hpcnn.ops.onednn`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal, TypeAlias

import numpy as np

from hpcnn.arrays import Array
from hpcnn.errors import ShapeError
from hpcnn.ops import cpu

Name: TypeAlias = Literal["numpy", "onednn"]
Compute: TypeAlias = Literal["fp32", "tf32"]

VARIABLE = "HPCNN_ONEDNN"
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

# The implementation of float32 arrays; None until the first call asks for it.
_float32: ModuleType | None = None
_compute: Compute = "fp32"


def implementation(x: Array) -> ModuleType:
    """Return the module whose functions serve arrays like `x`.

    Raises
    ------
    ShapeError
        If `x` is not a float32 or float64 NumPy array.
    """
    if not isinstance(x, np.ndarray):
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        raise ShapeError(
            f"ops: array of type {kind}; this version computes on NumPy arrays. Copy it to the host first."
        )
    if x.dtype == np.float32:
        return _float32 if _float32 is not None else _choose()
    if x.dtype != np.float64:
        raise ShapeError(f"ops: array of type {x.dtype}; numbers must be float32 or float64. Convert it first.")
    return cpu


def set_compute(which: Compute) -> None:
    """Say how GPUs multiply float32 matrices from now on: exactly, or rounded to tf32. Sums are float32 either way."""
    global _compute
    _compute = which


def compute() -> Compute:
    """Return how GPUs multiply float32 matrices."""
    return _compute


def name() -> str:
    """Return which implementation serves float32 arrays, for logs: "onednn 3.2.0 (path)" or "numpy 2.3.1"."""
    chosen = _float32 if _float32 is not None else _choose()
    return f"numpy {np.__version__}" if chosen is cpu else str(chosen.describe())


@contextmanager
def use(which: Name) -> Iterator[ModuleType]:
    """Serve float32 arrays by the named implementation inside a `with` block; for tests and measurements.

    Raises
    ------
    RuntimeError
        If "onednn" is asked for and its library is not there.
    """
    global _float32
    before = _float32
    _float32 = cpu if which == "numpy" else _onednn()
    if _float32 is None:
        _float32 = before
        raise RuntimeError("ops: oneDNN was asked for but its library was not found; pip install 'hpcnn[onednn]'.")
    try:
        yield _float32
    finally:
        _float32 = before


def _choose() -> ModuleType:
    """Choose the implementation of float32 arrays, once."""
    global _float32
    chosen = None if os.environ.get(VARIABLE, "").lower() == "off" else _onednn()
    _float32 = cpu if chosen is None else chosen
    return _float32


def _onednn() -> ModuleType | None:
    """Return the oneDNN implementation if its library loads; raises where the user named one that does not."""
    from hpcnn.ops import onednn  # imported here: it loads a shared library, and few commands compute

    return onednn if onednn.available() else None
