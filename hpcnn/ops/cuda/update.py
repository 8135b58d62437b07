"""Weight updates in place on the device, over flat float32 arrays: one kernel each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hpcnn.arrays import Array
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.launch import THREADS, elementwise

ADAM = np.dtype(
    [
        (name, np.float32)
        for name in ("beta1", "beta2", "share1", "share2", "rate", "root", "epsilon", "weight_decay", "keep", "scale")
    ]
)
"""`struct Adam` of `kernels/update.cu`."""

_WIDTH = 4
# A sum of squares has at most so many partial sums on any device: its last bits do not depend on the processors.
_NORM_BLOCKS = 1024


def sgd_update(
    value: Array,
    grad: Array,
    velocity: Array,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    scale: float = 1.0,
    spared: Array | None = None,
    first: int = 0,
) -> None:
    """See `hpcnn.ops.sgd_update`."""
    numbers = (*map(np.float32, (lr, momentum, weight_decay, scale)), np.int32(nesterov), *_spared(spared, first))
    elementwise("update", "update_sgd", "f32", _WIDTH, (value, grad, velocity), *numbers)


def adam_update(
    value: Array,
    grad: Array,
    first_moment: Array,
    second_moment: Array,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    step: int,
    scale: float = 1.0,
    spared: Array | None = None,
    first: int = 0,
) -> None:
    """See `hpcnn.ops.adam_update`."""
    rate, root = lr / (1.0 - beta1 ** (step + 1)), 1.0 / math.sqrt(1.0 - beta2 ** (step + 1))
    keep, decay = (1.0 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    numbers = (beta1, beta2, 1.0 - beta1, 1.0 - beta2, rate, root, epsilon, decay, keep, scale)
    arguments = np.array(numbers, ADAM), *_spared(spared, first)
    elementwise("update", "update_adam", "f32", _WIDTH, (value, grad, first_moment, second_moment), *arguments)


def lars_update(
    value: Array,
    grad: Array,
    velocity: Array,
    *,
    rate: float,
    momentum: float,
    weight_decay: float = 0.0,
    scale: float = 1.0,
) -> None:
    """See `hpcnn.ops.lars_update`."""
    numbers = map(np.float32, (rate, momentum, weight_decay, scale))
    elementwise("update", "update_lars", "f32", _WIDTH, (value, grad, velocity), *numbers)


def _spared(spared: Array | None, first: int) -> tuple[Array | None, np.int32, np.int64]:
    """Return the arguments of `struct Spared`."""
    return spared, np.int32(0 if spared is None else spared.shape[0]), np.int64(first)


def squared_norm(x: Array) -> float:
    """See `hpcnn.ops.squared_norm`; waits for the result. The same on every device, wherever `x` begins."""
    return float(_squares(x, None, 1, x.size)[0]) if x.size else 0.0


def squared_norms(x: Array, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """See `hpcnn.ops.squared_norms`; waits for the result, once for all."""
    if not bounds:
        return np.zeros(0)
    table = np.array(bounds, np.int64)
    return _squares(x, device().upload(table), len(bounds), int((table[:, 1] - table[:, 0]).max()))


def _squares(x: Array, bounds: Array | None, count: int, longest: int) -> np.ndarray:
    """Return the sums of squares of `count` stretches; `bounds` (count, 2) is on the device, None for all of `x`."""
    width = max(1, min(_NORM_BLOCKS, -(-longest // (4 * THREADS))))
    partial, totals = device().empty((count, width), np.float64), device().empty((count,), np.float64)
    size = np.int64(x.size)
    device().launch("update", "update_squares_f32", (width, count), (1, THREADS), x, bounds, partial, size)
    arguments = partial, bounds, totals, size, np.int32(width)
    device().launch("update", "update_squares_total", (count,), (1, THREADS), *arguments)
    return np.asarray(device().download(totals))
