"""Softmax and cross entropy in one, with its gradient. Legend: N samples, K classes."""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import Array
from hpcnn.errors import ShapeError
from hpcnn.ops import check
from hpcnn.ops.backend import implementation

WHO = "softmax_cross_entropy"


def softmax_cross_entropy(
    logits: Array, labels: Array, *, global_batch: int, label_smoothing: float = 0.0
) -> tuple[float, int, Array]:
    """Return this part's share of the mean loss over the global batch, its number of hits, and its gradient.

    The target of a sample is 1 - label_smoothing on its label plus label_smoothing / K on every class. Shares of ranks
    that split a batch add up to the loss of the batch.

    Parameters
    ----------
    logits : Array, shape (N, K)
    labels : Array of integers, shape (N,)
        Classes, 0 to K - 1.
    global_batch : int
        Samples of the whole batch; loss and gradient are sums over these N samples divided by it.
    label_smoothing : float
        At least 0 and below 1.

    Returns
    -------
    loss : float
        Accumulated in float64.
    num_correct : int
        Samples whose largest logit (the first of equals) is that of their label.
    grad_logits : Array, shape (N, K)

    Raises
    ------
    ShapeError
        If shapes do not fit, a label is not a class, or a number is out of range.
    """
    backend = implementation(logits)
    check.rank(WHO, "logits", logits, "NK")
    if tuple(labels.shape) != (logits.shape[0],) or not np.issubdtype(labels.dtype, np.integer):
        raise ShapeError(
            f"{WHO}: labels are {labels.dtype} of shape {tuple(labels.shape)};"
            f" they must be integers of shape ({logits.shape[0]},)."
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ShapeError(
            f"{WHO}: labels run from {labels.min()} to {labels.max()}; they must lie in 0 to {logits.shape[1] - 1},"
            " the logits' classes."
        )
    if global_batch < 1 or not 0.0 <= label_smoothing < 1.0:
        raise ShapeError(
            f"{WHO}: global_batch (={global_batch}) must be at least 1, and label_smoothing (={label_smoothing})"
            " at least 0 and below 1."
        )
    return backend.softmax_cross_entropy(
        check.contiguous(logits), labels, global_batch=global_batch, label_smoothing=label_smoothing
    )
