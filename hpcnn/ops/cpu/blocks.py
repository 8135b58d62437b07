"""Blocks that fit in cache, and sums over rows that stay exact for a million of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CACHE_ELEMENTS = 1 << 17
"""Elements of a block for chains of element-wise operations: 512 KiB of float32, so that a few blocks fit in L2."""

# Rows added up in the element type before float64 takes over: rounding grows with this number only.
_ROWS_PER_PARTIAL_SUM = 256


def row_blocks(num_rows: int, row_elements: int, elements: int = CACHE_ELEMENTS) -> Iterator[slice]:
    """Yield slices of at most `elements` elements (at least one row) that cover all rows."""
    step = max(1, elements // max(1, row_elements))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def column_sums(x: np.ndarray) -> np.ndarray:
    """Return the float64 sums (C,) over the rows of `x` (M, C)."""
    rows, columns = x.shape
    if x.dtype == np.float64:
        return np.asarray(x.sum(axis=0))
    # Several rows side by side make the inner loop of the sum long enough for vector units.
    fold = max(1, min(rows, 512 // columns))
    whole = rows // fold * fold
    wide = x[:whole].reshape(-1, fold * columns)
    total = np.zeros(fold * columns)
    for start in range(0, len(wide), _ROWS_PER_PARTIAL_SUM):
        total += wide[start : start + _ROWS_PER_PARTIAL_SUM].sum(axis=0)
    return total.reshape(fold, columns).sum(axis=0) + x[whole:].sum(axis=0)
