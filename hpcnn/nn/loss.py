"""Losses."""

from __future__ import annotations

import numpy as np

from hpcnn import ops
from hpcnn.arrays import Array


class SoftmaxCrossEntropy:
    """Cross entropy of the softmax of the logits, averaged over the global batch.

    Parameters
    ----------
    label_smoothing : float
        Share of the target probability that is spread evenly over all classes.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def forward(self, logits: Array, labels: np.ndarray, global_batch: int) -> tuple[float, int, Array]:
        """Return this block's share of the loss, and the gradient of the logits.

        Parameters
        ----------
        logits : Array, shape (N, classes)
            Output of the last layer.
        labels : numpy.ndarray, shape (N,)
            Class of each sample.
        global_batch : int
            Number of samples that the loss is divided by; shares of all blocks add up to the loss.

        Returns
        -------
        loss : float
            Sum over these samples, divided by `global_batch`.
        num_correct : int
            Samples whose largest logit is that of their class.
        grad_logits : Array, shape (N, classes)
            Divided by `global_batch` already.
        """
        return ops.softmax_cross_entropy(
            logits, labels, global_batch=global_batch, label_smoothing=self.label_smoothing
        )
