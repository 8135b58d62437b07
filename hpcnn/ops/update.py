"""Weight updates in place over flat arrays: SGD, Adam, LARS, and the norms that clipping and LARS need.

An update reads and writes every weight once and computes next to nothing, so memory sets its speed. NumPy's one
operation a pass would travel to memory five to ten times; here each block goes through all its passes while it
stays in the cache. Blocks are shared out over a small thread pool, NumPy releasing the interpreter in each pass.
No result depends on the number of threads: updates are elementwise, and norms add block sums in a fixed order.

Arrays on a GPU have kernels that do the same in one pass (`hpcnn.ops.cuda.update`).
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import ModuleType
from typing import Any

import numpy as np

from hpcnn.arrays import Array
from hpcnn.errors import ShapeError
from hpcnn.ops import backend

# A block of float32 with its gradient, state and one temporary is 2 MiB: at home in the cache of one core.
BLOCK = 1 << 17
# float64 temporaries of a norm's block are 256 KiB. Also the grain of its sum: a change alters the last bits.
NORM_BLOCK = 1 << 15

_num_threads = 0
_pool: ThreadPoolExecutor | None = None
_scratch = threading.local()


def set_num_threads(count: int) -> None:
    """Let updates use so many threads, the calling one included; the cores that belong to this process."""
    global _num_threads, _pool
    if count < 1:
        raise ValueError(f"update: number of threads (={count}) must be at least 1.")
    _num_threads = count
    if _pool is not None:
        _pool.shutdown()
        _pool = None


def num_threads() -> int:
    """Return how many threads updates use: as set, or else OMP_NUM_THREADS, or else the cores of this process."""
    global _num_threads
    if _num_threads == 0:
        asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        _num_threads = int(asked) if asked.isdecimal() and int(asked) > 0 else len(os.sched_getaffinity(0))
    return _num_threads


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
    """Take one step of stochastic gradient descent with momentum, in place.

    With g = scale * grad + weight_decay * value: velocity = momentum * velocity + g, then value -= lr * velocity,
    or value -= lr * (g + momentum * velocity) with `nesterov`.

    Parameters
    ----------
    value, grad, velocity : Array, shape (count,)
        Weights, their gradient (not changed) and the running sum of gradients.
    lr, momentum, weight_decay : float
        Learning rate, decay of the velocity, and pull of the weights towards zero.
    nesterov : bool
        Look ahead along the new velocity.
    scale : float
        Factor of the gradient, below one when it is clipped.
    spared : Array of int64, shape (R, 2), optional
        Ranges (start, stop) without weight decay, in order, of the vector of which `value` is a stretch. It lives
        where `value` does.
    first : int
        Where `value` begins in that vector.

    Raises
    ------
    ShapeError
        If the arrays are not flat, contiguous, and of one size and type.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning", ICML 2013.
    """
    cuda = _check("sgd_update", value, grad, velocity)
    if cuda is not None:
        options: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay, "scale": scale}
        options["nesterov"] = nesterov
        return cuda.sgd_update(value, grad, velocity, lr=lr, spared=spared, first=first, **options)
    if spared is not None:
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "scale": scale}
        for part, decay in _parts(value.size, spared, first, weight_decay):
            sgd_update(value[part], grad[part], velocity[part], weight_decay=decay, **options)
        return None

    def body(block: slice, t: np.ndarray, u: np.ndarray) -> None:
        w, v = value[block], velocity[block]
        g = _gradient(w, grad[block], weight_decay, scale, t, u)
        np.multiply(v, momentum, out=v)
        np.add(v, g, out=v)
        if nesterov:
            np.multiply(v, momentum, out=u)
            np.add(u, g, out=u)
            np.multiply(u, lr, out=u)
        else:
            np.multiply(v, lr, out=u)
        np.subtract(w, u, out=w)

    _update(body, value)


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
    """Take one step of Adam, or of AdamW with `decoupled` weight decay, in place.

    With g = scale * grad (+ weight_decay * value for Adam; for AdamW value *= 1 - lr * weight_decay instead):
    first_moment = beta1 * first_moment + (1 - beta1) * g, second_moment = beta2 * second_moment + (1 - beta2) * g^2,
    and, both divided by 1 - beta^(step + 1), value -= lr * first_moment / (sqrt(second_moment) + epsilon).

    Parameters
    ----------
    value, grad, first_moment, second_moment : Array, shape (count,)
        Weights, their gradient (not changed), and the running means of the gradient and its square.
    lr, beta1, beta2, epsilon, weight_decay : float
        Learning rate, decay of the two means, guard of the quotient, and pull of the weights towards zero.
    decoupled : bool
        Decay the weights apart from the gradient (AdamW).
    step : int
        Updates made before this one; it corrects the bias of means that started at zero.
    scale, spared, first
        As in `sgd_update`.

    Raises
    ------
    ShapeError
        If the arrays are not flat, contiguous, and of one size and type.

    References
    ----------
    Kingma, Ba, "Adam", arXiv:1412.6980; Loshchilov, Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.
    """
    cuda = _check("adam_update", value, grad, first_moment, second_moment)
    if cuda is not None:
        options: dict[str, Any] = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
        }
        options |= {"decoupled": decoupled, "step": step, "scale": scale, "spared": spared, "first": first}
        return cuda.adam_update(value, grad, first_moment, second_moment, **options)
    if spared is not None:
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "epsilon": epsilon, "decoupled": decoupled}
        for part, decay in _parts(value.size, spared, first, weight_decay):
            arrays = (array[part] for array in (value, grad, first_moment, second_moment))
            adam_update(*arrays, weight_decay=decay, step=step, scale=scale, **options)
        return None
    first_share = 1.0 - beta1 ** (step + 1)
    second_root = math.sqrt(1.0 - beta2 ** (step + 1))

    def body(block: slice, t: np.ndarray, u: np.ndarray) -> None:
        w, m, v = value[block], first_moment[block], second_moment[block]
        if decoupled and weight_decay:
            np.multiply(w, 1.0 - lr * weight_decay, out=w)
        g = _gradient(w, grad[block], 0.0 if decoupled else weight_decay, scale, t, u)
        np.multiply(m, beta1, out=m)
        np.multiply(g, 1.0 - beta1, out=u)
        np.add(m, u, out=m)
        np.multiply(v, beta2, out=v)
        np.multiply(g, g, out=u)
        np.multiply(u, 1.0 - beta2, out=u)
        np.add(v, u, out=v)
        np.sqrt(v, out=u)
        np.multiply(u, 1.0 / second_root, out=u)
        np.add(u, epsilon, out=u)
        np.divide(m, u, out=u)
        np.multiply(u, lr / first_share, out=u)
        np.subtract(w, u, out=w)

    _update(body, value)


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
    """Take one step of LARS on one tensor, in place.

    velocity = momentum * velocity + rate * (scale * grad + weight_decay * value), then value -= velocity. Unlike in
    `sgd_update` the velocity holds the rate, so that a change of the rate does not change past steps.

    Parameters
    ----------
    value, grad, velocity : Array, shape (count,)
        The tensor's weights, their gradient (not changed) and the running sum of steps.
    rate : float
        Global learning rate times the tensor's own (`lars_rate`).
    momentum, weight_decay, scale : float
        As in `sgd_update`.

    Raises
    ------
    ShapeError
        If the arrays are not flat, contiguous, and of one size and type.

    References
    ----------
    You, Gitman, Ginsburg, "Large batch training of convolutional networks", arXiv:1708.03888, algorithm 1.
    """
    cuda = _check("lars_update", value, grad, velocity)
    if cuda is not None:
        options = {"rate": rate, "momentum": momentum, "weight_decay": weight_decay, "scale": scale}
        return cuda.lars_update(value, grad, velocity, **options)

    def body(block: slice, t: np.ndarray, u: np.ndarray) -> None:
        w, v = value[block], velocity[block]
        g = _gradient(w, grad[block], weight_decay, scale, t, u)
        np.multiply(v, momentum, out=v)
        np.multiply(g, rate, out=u)
        np.add(v, u, out=v)
        np.subtract(w, v, out=w)

    _update(body, value)


def lars_rate(
    value_norm: float, grad_norm: float, *, trust_coefficient: float, weight_decay: float, epsilon: float
) -> float:
    """Return the local rate of a tensor: trust * |w| / (|g| + weight_decay * |w| + epsilon).

    It is 1 where the quotient says nothing: for a tensor or gradient that is zero (a layer that starts at zero would
    stay there).
    """
    if value_norm == 0.0 or grad_norm == 0.0:
        return 1.0
    return trust_coefficient * value_norm / (grad_norm + weight_decay * value_norm + epsilon)


def squared_norm(x: Array) -> float:
    """Return the sum of the squares of a flat array, in float64.

    The sums of blocks of `NORM_BLOCK` are added in their order: no thread count changes a bit.
    """
    cuda = _check("squared_norm", x)
    if cuda is not None:
        return cuda.squared_norm(x)
    sums = np.empty(-(-x.size // NORM_BLOCK))

    def body(index: int, block: slice) -> None:
        temporary = _temporaries(np.dtype(np.float64), NORM_BLOCK, 1)[0][: block.stop - block.start]
        np.copyto(temporary, x[block])
        np.multiply(temporary, temporary, out=temporary)
        sums[index] = np.add.reduce(temporary)

    _for_blocks(body, x.size, NORM_BLOCK)
    return float(np.add.reduce(sums))


def squared_norms(x: Array, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return `squared_norm(x[start:stop])` for each (start, stop) of `bounds`, bit for bit, as a float64 host array.

    On a GPU this waits once, not once for each.
    """
    cuda = _check("squared_norms", x)
    if any(not 0 <= start <= stop <= x.size for start, stop in bounds):
        raise ShapeError(
            f"squared_norms: bounds (={list(bounds)}) must be ranges within the array's {x.size} elements."
        )
    if cuda is not None:
        return cuda.squared_norms(x, bounds)
    return np.array([squared_norm(x[start:stop]) for start, stop in bounds], np.float64)


def _parts(count: int, spared: np.ndarray, first: int, weight_decay: float) -> Iterator[tuple[slice, float]]:
    """Yield the stretches of equal weight decay of an array of `count` elements, and their weight decay."""
    begin = 0
    for start, stop in spared.tolist():
        low, high = (min(max(bound - first, begin), count) for bound in (start, stop))
        if begin < low:
            yield slice(begin, low), weight_decay
        if low < high:
            yield slice(low, high), 0.0
        begin = max(begin, high)
    if begin < count:
        yield slice(begin, count), weight_decay


def _gradient(
    value: np.ndarray, grad: np.ndarray, weight_decay: float, scale: float, t: np.ndarray, u: np.ndarray
) -> np.ndarray:
    """Return scale * grad + weight_decay * value: in `t`, or `grad` itself where that is the same. `u` is lost."""
    if scale != 1.0:
        grad = np.multiply(grad, scale, out=u if weight_decay else t)
    if weight_decay:
        np.multiply(value, weight_decay, out=t)
        grad = np.add(t, grad, out=t)
    return grad


def _update(body: Callable[[slice, np.ndarray, np.ndarray], None], value: np.ndarray) -> None:
    """Call `body` for each block with two temporaries as long as the block."""

    def with_temporaries(_: int, block: slice) -> None:
        size = block.stop - block.start
        t, u = _temporaries(value.dtype, BLOCK, 2)
        body(block, t[:size], u[:size])

    _for_blocks(with_temporaries, value.size, BLOCK)


def _for_blocks(body: Callable[[int, slice], None], count: int, block: int) -> None:
    """Call `body(index, slice)` for each block of range(count), on this thread and the pool's."""
    global _pool
    num_blocks = -(-count // block)
    helpers = min(num_threads(), num_blocks) - 1
    turns = itertools.count()  # its next() is atomic

    def work() -> None:
        for index in turns:
            if index >= num_blocks:
                return
            body(index, slice(index * block, min((index + 1) * block, count)))

    if helpers < 1:
        return work()
    if _pool is None:
        _pool = ThreadPoolExecutor(num_threads() - 1, thread_name_prefix="hpcnn-update")
    others = [_pool.submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        wait(others)
    for other in others:
        other.result()


def _temporaries(dtype: np.dtype, size: int, count: int) -> tuple[np.ndarray, ...]:
    """Return this thread's own `count` temporaries, made once."""
    key = f"{dtype}, {size}, {count}"
    if not hasattr(_scratch, key):
        setattr(_scratch, key, tuple(np.empty(size, dtype) for _ in range(count)))
    return getattr(_scratch, key)


def _check(who: str, *arrays: Array) -> ModuleType | None:
    """Refuse what is not flat, contiguous, of one size and of one floating type.

    Returns the module of the device's updates for arrays that a GPU serves, None for those of the host.
    """
    first = arrays[0]
    for x in arrays:
        if type(x) is not type(first) or x.ndim != 1 or not x.flags.c_contiguous or x.dtype.kind != "f":
            raise ShapeError(f"{who}: arrays must be flat, contiguous arrays of floats. Pass x.reshape(-1).")
        if x.size != first.size or x.dtype != first.dtype:
            raise ShapeError(
                f"{who}: sizes and types must agree; got {', '.join(f'{y.size} {y.dtype}' for y in arrays)}."
            )
    if backend.implementation(first).__name__ != "hpcnn.ops.cuda":
        return None
    from hpcnn.ops.cuda import update  # imported here: few runs have a GPU

    return update
