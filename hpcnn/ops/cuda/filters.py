"""Filters in the form that matrix units want: rounded, turned round for input gradients, padded to whole vectors."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from hpcnn.arrays import Array, Shape
from hpcnn.ops.cuda import types
from hpcnn.ops.cuda.device import GIVEN, Launch, device, remembered
from hpcnn.ops.cuda.products import Compute

THREADS = 256
TILE = 32


def converted(
    weight: Array, compute: Compute, transposed: bool, *, align: int = 1, groups: int = 1, temporary: bool = False
) -> Array:
    """Return filters in the element type of the products, as they are or turned round.

    Parameters
    ----------
    weight : Array, shape (K, R, S, C / groups)
        Filters of the forward pass, float32 and C-ordered.
    compute : {"fp32", "tf32", "bf16"}
        "tf32" gives float32 rounded to the nearest tf32, which tensor cores then read without loss.
    transposed : bool
        Whether to exchange filters and channels and reverse R and S: with these filters the input gradient of a
        convolution of stride 1 is a convolution of `grad_output`.
    align : int
        Pads the last axis with zeros to a multiple of this.
    groups : int
        Matters only where `transposed`.
    temporary : bool
        Whether the result may be scratch of the device: flat, and not for longer than the operator.

    Returns
    -------
    Array
        (K, R, S, C / groups padded), or where `transposed` (C, R, S, K / groups padded); `weight` itself where nothing
        is to be done.
    """
    plan = _conversion(weight.shape, compute, transposed, align, groups)
    if plan is None:
        return weight
    shape, dtype, launch = plan
    out = device().scratch(prod(shape), dtype) if temporary else device().empty(shape, dtype)
    launch(weight, out)
    return out


@remembered
def _conversion(
    shape: Shape, compute: Compute, transposed: bool, align: int, groups: int
) -> tuple[Shape, Any, Launch] | None:
    """Return shape and type of converted filters, and what converts them; None where nothing is to be done."""
    k, r, s, depth = shape
    dtype: Any = types.bfloat16() if compute == "bf16" else np.float32
    variant = {"fp32": "f32", "tf32": "tf32", "bf16": "bf16"}[compute]
    if not transposed:
        padded = -(-depth // align) * align
        if compute == "fp32" and padded == depth:
            return None
        args = (GIVEN, GIVEN, np.int64(k * r * s), np.int32(depth), np.int32(padded))
        blocks = -(-k * r * s * padded // THREADS)
        launch = device().prepare("filter", f"filter_plain_{variant}", (blocks,), (THREADS,), *args)
        return (k, r, s, padded), dtype, launch
    filters = k // groups
    padded = -(-filters // align) * align
    numbers = (np.int32(n) for n in (filters, r * s, depth, padded))
    grid = (-(-depth // TILE), -(-padded // TILE), groups * r * s)
    launch = device().prepare("filter", f"filter_transposed_{variant}", grid, (TILE, 8), GIVEN, GIVEN, *numbers)
    return (groups * depth, r, s, padded), dtype, launch
