"""Weight gradients of convolutions on wide images as products of matrices, strip by strip.

The library's own code passes over a row of the output gradient once for every few input channels. A row that outgrows
the first-level cache makes it wait, the more the fewer channels there are: half its speed on 64 channels and a tenth
on an image's 3. A product of matrices, A^T B with a row for each pixel of a strip, has no such weakness. B is the strip
of the output gradient. A comes in two forms:

- columns: a column for each place of the filter and channel; for few channels, since it repeats the input R S times.
- shifts: the padded input as it lies, once for every place (r, s), read from r rows and s pixels further on. B is laid
  out in rows as wide as the padded input, zero behind its end, so that pixel i of B meets pixel i of A throughout.

Strips are divided among threads, each with a sum of its own; the sums are added in order, so that a number of threads
always gives the same bits.
Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows
and columns, L = R S C.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np

from hpcnn.arrays import Padding, Pair, empty
from hpcnn.geometry import split
from hpcnn.ops.onednn import library as lib
from hpcnn.ops.onednn.primitive import address

FIRST_LEVEL_BYTES = 1 << 15
MOST_COLUMNS = 64
MOST_SHIFTED_WEIGHTS = 1 << 14
STRIP_BYTES = 1 << 21


class _Strip(NamedTuple):
    """Output rows `start` to `stop` of one sample."""

    sample: int
    start: int
    stop: int


class Window(NamedTuple):
    """How a filter slides."""

    kernel_size: Pair
    stride: Pair
    padding: Padding
    dilation: Pair

    def pays(self, channels: int, columns: int, filters: int) -> bool:
        """Return whether products are faster than the library for C channels and output rows of Q x K."""
        if 4 * columns * filters <= FIRST_LEVEL_BYTES or self.kernel_size == (1, 1):
            return False
        dense = self.stride == (1, 1) and channels * filters <= MOST_SHIFTED_WEIGHTS
        return dense or self.is_narrow(channels)

    def is_narrow(self, channels: int) -> bool:
        """Return whether there are few enough channels to lay the input out as columns."""
        return self.kernel_size[0] * self.kernel_size[1] * channels < MOST_COLUMNS

    def rows_read(self, rows: int) -> int:
        """Return how many rows of the padded input so many output rows need."""
        return (rows - 1) * self.stride[0] + (self.kernel_size[0] - 1) * self.dilation[0] + 1


def backward_weight(x: np.ndarray, grad_output: np.ndarray, window: Window) -> np.ndarray:
    """Return dW and, in the last row, db as one matrix (L + 1, K)."""
    (N, P, Q, K), (R, S), C = grad_output.shape, window.kernel_size, x.shape[3]
    row_bytes = 4 * Q * (K + (R * S * C if window.is_narrow(C) else C))
    rows = max(1, min(P, STRIP_BYTES // row_bytes))
    strips = [_Strip(n, start, min(start + rows, P)) for n in range(N) for start in range(0, P, rows)]
    threads = min(lib.num_threads(), len(strips))
    sums = np.zeros((threads, R * S * C + 1, K), np.float32)
    add = _add_columns if window.is_narrow(C) else _add_shifts

    def work(index: int) -> None:
        part = split(len(strips), threads, index)
        add(sums[index], x, grad_output, window, strips[part.start : part.stop], rows)

    others = [_pool(threads - 1).submit(work, index) for index in range(1, threads)]
    before = lib.num_threads()
    lib.set_num_threads(1)
    try:
        work(0)
    finally:
        lib.set_num_threads(before)
        for other in others:
            other.result()
    for other_sum in sums[1:]:
        sums[0] += other_sum
    return sums[0]


def _add_columns(
    total: np.ndarray, x: np.ndarray, grad_output: np.ndarray, window: Window, strips: Sequence[_Strip], rows: int
) -> None:
    """Add the products of strips, the input laid out as columns and one of ones."""
    Q, (R, S), C = grad_output.shape[2], window.kernel_size, x.shape[3]
    padded = _PaddedRows(x, window, rows)
    columns = empty((rows, Q, R * S * C + 1))
    columns[..., -1] = 1.0
    extent = window.rows_read(1), (S - 1) * window.dilation[1] + 1
    for strip in strips:
        count = strip.stop - strip.start
        view = np.lib.stride_tricks.sliding_window_view(padded.read(strip), extent, axis=(0, 1))
        view = view[:: window.stride[0], :: window.stride[1], :, :: window.dilation[0], :: window.dilation[1]]
        columns[:count, :, :-1].reshape(count, Q, R, S, C)[...] = view[:count, :Q].transpose(0, 1, 3, 4, 2)
        _multiply(address(columns), address(grad_output[strip.sample, strip.start]), total, count * Q)


def _add_shifts(
    total: np.ndarray, x: np.ndarray, grad_output: np.ndarray, window: Window, strips: Sequence[_Strip], rows: int
) -> None:
    """Add the products of strips, the input read from each place of the filter on."""
    (_, _, Q, K), (R, S), C = grad_output.shape, window.kernel_size, x.shape[3]
    padded = _PaddedRows(x, window, rows)
    width = padded.width
    error = np.zeros((rows, width, K), np.float32)
    ones = np.ones(rows * width, np.float32)
    for strip in strips:
        count = strip.stop - strip.start
        source = address(padded.read(strip))
        error[:count, :Q] = grad_output[strip.sample, strip.start : strip.stop]
        for place in range(R * S):
            r, s = divmod(place, S)
            shift = r * window.dilation[0] * width + s * window.dilation[1]
            _multiply(source + 4 * C * shift, address(error), total[place * C : (place + 1) * C], count * width)
        _multiply(address(ones), address(error), total[-1:], count * width)


class _PaddedRows:
    """Room for the input rows that a strip reads, with padding on all sides."""

    def __init__(self, x: np.ndarray, window: Window, rows: int) -> None:
        (self._top, _), (self._left, right) = window.padding
        self._x, self._window, self.width = x, window, x.shape[2] + self._left + right
        height, channels = window.rows_read(rows), x.shape[3]
        # The last shift reads a few pixels behind the last row; they meet zeros.
        memory = np.zeros((height * self.width + self.width, channels), np.float32)
        self._rows = memory[: height * self.width].reshape(height, self.width, channels)

    def read(self, strip: _Strip) -> np.ndarray:
        """Return the padded rows that `strip` needs; valid until the next call."""
        height, columns = self._x.shape[1:3]
        first = strip.start * self._window.stride[0] - self._top
        rows = self._rows[: self._window.rows_read(strip.stop - strip.start)]
        start, stop = min(max(0, -first), len(rows)), max(0, min(len(rows), height - first))
        rows[:start], rows[stop:] = 0, 0
        rows[start:stop, self._left : self._left + columns] = self._x[strip.sample, first + start : first + stop]
        return rows


def _multiply(a: int, b: int, total: np.ndarray, pixels: int) -> None:
    """Add A^T B to `total` (columns, filters), for A (pixels, columns) and B (pixels, filters) at two addresses."""
    columns, filters = total.shape
    status = lib.library().dnnl_sgemm(
        b"T", b"N", columns, filters, pixels, 1.0, a, columns, b, filters, 1.0, address(total), filters
    )
    lib.check(status, f"product of ({columns}, {pixels}) and ({pixels}, {filters})")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that work for themselves: what they start in the library stays on one thread."""
    return ThreadPoolExecutor(threads, "hpcnn-products", initializer=lib.set_num_threads, initargs=(1,))
