"""Which implementation serves an array: CUDA for CuPy's; for NumPy's, oneDNN where its library loads.

It takes float32 and bfloat16. Without that library, and for float64, plain NumPy serves. The choice is made once, at
the first call, so that importing `hpcnn.ops` costs nothing. `HPCNN_ONEDNN=off` forces NumPy, `HPCNN_ONEDNN=path` names
the library to load (see `hpcnn.ops.onednn`).
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

Name: TypeAlias = Literal["numpy", "onednn", "cuda"]
Compute: TypeAlias = Literal["fp32", "tf32"]

VARIABLE = "HPCNN_ONEDNN"
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
BFLOAT16 = "bfloat16"
"""Name of the type that ml_dtypes brings; it need not be installed to recognise it."""

# The implementation of float32 and bfloat16 NumPy arrays; None until the first call asks for it.
_float32: ModuleType | None = None
# That of CuPy arrays; None until the first comes along.
_cuda: ModuleType | None = None
_compute: Compute = "fp32"


def implementation(x: Array) -> ModuleType:
    """Return the module whose functions serve arrays like `x`.

    Raises
    ------
    ShapeError
        If `x` is not an array of float32 or bfloat16, or of float64 on the host.
    """
    if not isinstance(x, np.ndarray):
        return _of_gpu_array(x)
    if x.dtype == np.float32 or x.dtype.type.__name__ == BFLOAT16:
        return _float32 if _float32 is not None else _choose()
    if x.dtype == np.float64:
        return cpu
    raise ShapeError(f"ops: array of type {x.dtype}; numbers must be float32, float64 or bfloat16. Convert it first.")


def set_compute(which: Compute) -> None:
    """Say how GPUs multiply float32 matrices from now on: exactly, or rounded to tf32. Sums are float32 either way."""
    global _compute
    _compute = which


def compute() -> Compute:
    """Return how GPUs multiply float32 matrices."""
    return _compute


def name() -> str:
    """Return which implementation serves float32 NumPy arrays, for logs: "onednn 3.2.0 (path)" or "numpy 2.3.1"."""
    chosen = _float32 if _float32 is not None else _choose()
    if chosen is _cuda:
        return f"cuda on {device_name()}"
    return f"numpy {np.__version__}" if chosen is cpu else str(chosen.describe())


def device_name() -> str:
    """Return what serves CuPy arrays, for logs: "NVIDIA H100 80GB HBM3 (sm_90)".

    Raises
    ------
    DeviceError
        If there is no GPU to compute on.
    """
    from hpcnn.ops.cuda.device import device

    return f"{device().name} (sm_{device().architecture})"


@contextmanager
def use(which: Name) -> Iterator[ModuleType]:
    """Serve float32 and bfloat16 NumPy arrays by the named implementation inside a `with` block.

    For tests and measurements. "cuda" runs on the device in use, which must take NumPy arrays: the tests' emulation.

    Raises
    ------
    RuntimeError
        If "onednn" is asked for and its library is not there.
    """
    global _float32
    before = _float32
    _float32 = cpu if which == "numpy" else _onednn() if which == "onednn" else _load_cuda()
    if _float32 is None:
        _float32 = before
        raise RuntimeError("ops: oneDNN was asked for but its library was not found; pip install 'hpcnn[onednn]'.")
    try:
        yield _float32
    finally:
        _float32 = before


def _of_gpu_array(x: Array) -> ModuleType:
    """Return the implementation for an array that is not NumPy's."""
    if type(x).__module__.partition(".")[0] != "cupy":
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        raise ShapeError(f"ops: array of type {kind}; arrays must be NumPy's or CuPy's. Copy it to the host first.")
    if x.dtype != FLOATS[0] and x.dtype.type.__name__ != BFLOAT16:
        raise ShapeError(
            f"ops: CuPy array of type {x.dtype}; GPUs compute on float32 or bfloat16, and float64 runs on the CPU. "
            "Convert it, or copy it to the host."
        )
    return _cuda if _cuda is not None else _load_cuda()


def _load_cuda() -> ModuleType:
    global _cuda
    if _cuda is None:
        from hpcnn.ops import cuda  # imported here: few runs have a GPU

        _cuda = cuda
    return _cuda


def _choose() -> ModuleType:
    """Choose the implementation of float32 NumPy arrays, once."""
    global _float32
    chosen = None if os.environ.get(VARIABLE, "").lower() == "off" else _onednn()
    _float32 = cpu if chosen is None else chosen
    return _float32


def _onednn() -> ModuleType | None:
    """Return the oneDNN implementation if its library loads; raises where the user named one that does not."""
    from hpcnn.ops import onednn  # imported here: it loads a shared library, and few commands compute

    return onednn if onednn.available() else None
