"""Operators on bfloat16 arrays by way of float32: widen what comes in, compute, round what goes out.

One mechanism for everything that has no code of its own for 16 bits. Widening is exact and results are rounded once, to
nearest, ties to even, so that nothing is nearer to the formula on the given numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from hpcnn.arrays import empty

F = TypeVar("F", bound=Callable[..., Any])
BYTES = 2
"""Of a bfloat16, the only type of that size among arrays that operators take."""


def _never(*_: Any, **__: Any) -> bool:
    return False


def through_float32(function: F, *, rounded: int | None = 0, unless: Callable[..., bool] = _never) -> F:
    """Return an operator that takes bfloat16 arrays too, made of one that takes float32.

    Parameters
    ----------
    function : callable
        An implementation of an operator (see `hpcnn.ops`); its first argument has the type of the activations.
    rounded : int or None
        Which of its results has the type of the activations; None for operators that give only gradients of parameters,
        or statistics, which are always float32 or wider.
    unless : callable
        Asked at each call on bfloat16, with its arguments: whether `function` itself takes it.

    Returns
    -------
    callable
        It hands arguments of other types to `function` as they are.
    """

    @wraps(function)
    def operator(x: np.ndarray, *others: Any, **options: Any) -> Any:
        if x.dtype.itemsize != BYTES or unless(x, *others, **options):
            return function(x, *others, **options)
        arguments = [_cast(other, np.float32) if _is_like(x, other) else other for other in others]
        results = function(_cast(x, np.float32), *arguments, **options)
        if rounded is None:
            return results
        if not isinstance(results, tuple):
            return _cast(results, x.dtype)
        wide = results[rounded]
        narrow = _cast(wide, x.dtype)
        # An output that is its own mask stays one array.
        return tuple(narrow if result is wide else result for result in results)

    return operator  # type: ignore[return-value]


def _is_like(x: np.ndarray, other: Any) -> bool:
    """Return whether something is an array of the type of `x`."""
    return isinstance(other, np.ndarray) and other.dtype == x.dtype


def _cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return the same numbers as another type, rounded to nearest, on pooled pages."""
    y = empty(x.shape, dtype)
    np.copyto(y, x, casting="unsafe")
    return y
