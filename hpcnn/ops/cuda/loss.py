"""Softmax cross entropy on the device; only the loss and the number of hits come back."""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import Array
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.launch import THREADS, empty_like
from hpcnn.ops.cuda.types import suffix


def softmax_cross_entropy(
    logits: Array, labels: Array, *, global_batch: int, label_smoothing: float = 0.0
) -> tuple[float, int, Array]:
    """See `hpcnn.ops.softmax_cross_entropy`; labels may be on the host. Waits for the result."""
    samples, classes = logits.shape
    on_host = isinstance(labels, np.ndarray)
    labels = device().upload(labels, np.int32) if on_host else labels.astype(np.int32, copy=False)
    grad_logits = empty_like(logits)
    rows, sums = device().empty((2, samples), np.float64), device().empty((2,), np.float64)
    threads = max(32, min(THREADS, 1 << (classes - 1).bit_length()))
    device().launch(
        "loss",
        f"softmax_rows_{suffix(logits.dtype)}",
        (min(samples, 1 << 16),),
        (threads,),
        *(logits, labels, grad_logits, rows, np.int32(samples), np.int32(classes)),
        *(np.float64(label_smoothing), np.float64(global_batch)),
    )
    device().launch("loss", "softmax_sums", (1,), (THREADS,), rows, sums, np.int32(samples))
    loss, num_correct = device().download(sums)
    return float(loss) / global_batch, int(num_correct), grad_logits
