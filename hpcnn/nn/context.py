"""What a layer may know about the step it takes part in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpcnn.arrays import Array


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """One forward and backward pass over a block of samples.

    Attributes
    ----------
    training : bool
        Whether the pass is going to be followed by backward; layers save nothing for it otherwise.
    seed, step : int
        Keys of random draws.
    samples : numpy.ndarray, shape (N,)
        Global index of each sample of the block: which numbers it draws does not depend on who holds it.
    global_batch : int
        Number of samples in the whole batch.
    reduce_sum : callable or None
        Sums a float64 array in place over everyone who holds part of the batch (collective). None when this process
        holds all of it, or when batch statistics are to be local.
    tracks : bool
        Whether running statistics move: of several blocks of a batch that this process computes one by one, one is
        enough.
    """

    training: bool
    seed: int
    step: int
    samples: np.ndarray
    global_batch: int
    reduce_sum: Callable[[Array], None] | None = None
    tracks: bool = True
