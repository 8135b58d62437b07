"""Arrays of float32 and bfloat16 for tests of kernels: drawn, rounded, and put where vectors cannot begin."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BFLOAT16]
TOLERANCES = {DTYPES[0]: 1e-6, BFLOAT16: 4e-3}
"""Relative to the largest number: a few roundings of float32, or half a unit in the last of bfloat16's 8 bits."""


def draw(random, shape, dtype=np.float32):
    """Return normal numbers, as the type rounds them."""
    return random.standard_normal(shape).astype(dtype)


def unaligned(device, x):
    """Upload an array so that it begins one element behind a multiple of 16 bytes."""
    room = device.upload(np.concatenate([x.ravel()[:1], x.ravel()]))
    return room[1:].reshape(x.shape)


def rounded(x, dtype):
    """Return a float64 array rounded to a type, as float64."""
    return np.asarray(x).astype(dtype).astype(np.float64)
