"""Softmax cross entropy in NumPy. Logits are few, so all of it is done in float64."""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import empty_like


def softmax_cross_entropy(
    logits: np.ndarray, labels: np.ndarray, *, global_batch: int, label_smoothing: float = 0.0
) -> tuple[float, int, np.ndarray]:
    """See `hpcnn.ops.softmax_cross_entropy`."""
    rows, classes = np.arange(len(logits)), logits.shape[1]
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits make a loss that is no number, which the trainer reports
        shifted -= shifted.max(axis=1, keepdims=True)
    probability = np.exp(shifted)
    sums = probability.sum(axis=1, keepdims=True)
    probability /= sums
    log_probability = shifted - np.log(sums)
    share = label_smoothing / classes
    own = (1.0 - label_smoothing) * log_probability[rows, labels]
    loss = -(own.sum() + share * log_probability.sum()) / global_batch

    probability -= share
    probability[rows, labels] -= 1.0 - label_smoothing
    probability /= global_batch
    grad_logits = empty_like(logits)
    grad_logits[...] = probability
    num_correct = np.count_nonzero(logits.argmax(axis=1) == labels)
    return float(loss), int(num_correct), grad_logits
