"""Checks that the public operators share; each raises `ShapeError` with the numbers that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Shape, array_module
from hpcnn.errors import ShapeError

FLOAT32 = np.dtype(np.float32)
ACTIVATIONS = ("relu", "leaky_relu")


def contiguous(x: Array) -> Array:
    """Return `x`, or a C-ordered copy of it where it is a view with gaps."""
    return x if x.flags.c_contiguous else array_module(x).ascontiguousarray(x)


def matrix(x: Array) -> Array:
    """Return a matrix as it is if it or its transpose is C-ordered, else a C-ordered copy."""
    return x if x.flags.f_contiguous else contiguous(x)


def rank(who: str, name: str, x: Array, letters: str) -> None:
    """Raise unless `x` has one axis for each letter, none of them empty."""
    if x.ndim != len(letters) or 0 in x.shape:
        axes = ", ".join(letters)
        raise ShapeError(f"{who}: {name} has shape {tuple(x.shape)}; it must be ({axes}), every extent at least 1.")


def like(who: str, name: str, x: Array, shape: Shape, dtype: Any) -> None:
    """Raise unless `x` has exactly this shape and element type."""
    if tuple(x.shape) != shape or (x.dtype is not dtype and x.dtype != dtype):
        raise ShapeError(f"{who}: {name} is {x.dtype} of shape {tuple(x.shape)}; it must be {dtype} of shape {shape}.")


def parameter_dtype(x: Array) -> Any:
    """Return the element type of parameters and their gradients beside activations like `x`: float32 for bfloat16."""
    return FLOAT32 if x.dtype.itemsize == 2 else x.dtype


def activation(who: str, kind: str | None) -> None:
    """Raise unless `kind` is None or the name of an activation."""
    if kind is not None and kind not in ACTIVATIONS:
        raise ShapeError(
            f"{who}: activation (={kind!r}) is unknown; it must be one of {', '.join(ACTIVATIONS)}, or None."
        )


def outputs(
    who: str,
    out: Sequence[Array | None] | None,
    shapes: Sequence[Shape | None],
    dtype: Any,
    *,
    either_order: bool = False,
) -> None:
    """Raise unless `out` is None or holds one writable C-ordered array for each shape (None where that is None).

    With `either_order`, an array may be C-ordered or Fortran-ordered.
    """
    if out is None:
        return
    if len(out) != len(shapes):
        raise ShapeError(f"{who}: out holds {len(out)} arrays; it must hold {len(shapes)}.")
    for array, shape in zip(out, shapes, strict=True):
        if shape is None or array is None:
            if shape is not None:
                raise ShapeError(f"{who}: out lacks the array of shape {shape}. Pass it, or leave out away altogether.")
            continue
        like(who, "out", array, shape, dtype)
        if not (array.flags.c_contiguous or (either_order and array.flags.f_contiguous)):
            orders = "C-ordered or Fortran-ordered" if either_order else "C-ordered"
            raise ShapeError(f"{who}: out of shape {shape} is a view with gaps; it must be {orders}.")
