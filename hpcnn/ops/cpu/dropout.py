"""Dropout in NumPy."""

from __future__ import annotations

import numpy as np

from hpcnn import rng
from hpcnn.arrays import empty, empty_like
from hpcnn.ops.cpu.blocks import row_blocks


def dropout_forward(
    x: np.ndarray, rate: float, stream: int, samples: np.ndarray, elements: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """See `hpcnn.ops.dropout_forward`."""
    y, mask = empty_like(x), empty(x.shape, bool)
    source, target, keep = (array.reshape(len(x), -1) for array in (x, y, mask))
    scale = x.dtype.type(1.0 / (1.0 - rate))
    for column in row_blocks(source.shape[1], 1):
        for row in row_blocks(len(x), column.stop - column.start):
            here = (row, column)
            counters = rng.sample_elements(samples[row], elements[column])
            np.greater_equal(rng.uniform(stream, counters), np.float32(rate), out=keep[here])
            np.multiply(source[here], scale, out=target[here])
            target[here] *= keep[here]
    return y, mask


def dropout_backward(grad_output: np.ndarray, mask: np.ndarray, rate: float) -> np.ndarray:
    """See `hpcnn.ops.dropout_backward`."""
    grad_input = empty_like(grad_output)
    grad, keep, target = grad_output.reshape(-1), mask.reshape(-1), grad_input.reshape(-1)
    scale = grad.dtype.type(1.0 / (1.0 - rate))
    for block in row_blocks(grad.size, 1):
        np.multiply(grad[block], scale, out=target[block])
        target[block] *= keep[block]
    return grad_input
