"""The weights of replicas in their average, from what each scores on images that none has trained with.

Pure functions of what all ranks know, so that all come to the same weights. Those are multiples of 2^-24, of which
float32 holds every one: they add up to exactly 1, in any order, and an average of equal replicas is the replica.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcnn.config import AverageConfig

UNITS = 1 << 24
"""A weight is a whole number of these parts."""

_SMALLEST_LOSS = 1e-12


class Scores(NamedTuple):
    """Of the replicas of all groups, in their order; float64 (groups,) each."""

    loss: np.ndarray
    """On the held-out images."""
    accuracy: np.ndarray
    """On the same."""
    images: np.ndarray
    """How many the group may train with."""


def shares(config: AverageConfig, scores: Scores) -> np.ndarray:
    """Return what the rule gives each replica, float64 (groups,), at least 0, of sum 1 up to rounding."""
    match config.rule:
        case "size":
            merits = scores.images
        case "accuracy":
            merits = scores.accuracy
        case "inverse-loss":
            merits = 1.0 / np.maximum(scores.loss, _SMALLEST_LOSS)
        case "softmax":
            merits = np.exp((scores.loss.min() - scores.loss) / config.temperature)
        case "best":
            merits = (scores.loss == scores.loss.min()).astype(np.float64)
        case _:
            merits = np.ones(len(scores.images))
    if not merits.any():  # nobody has a single correct answer
        merits = np.ones_like(merits)
    total: float = np.sort(merits).sum()  # whoever has which merit
    return np.asarray(merits / total)


def smoothed(shares: np.ndarray, before: np.ndarray | None, smoothing: float) -> np.ndarray:
    """Return an exponential moving average of the shares of the rounds so far."""
    if before is None or len(before) != len(shares):
        return shares
    return smoothing * before + (1.0 - smoothing) * shares


def weights(shares: np.ndarray, floor: float = 0.0) -> list[float]:
    """Return the weights for shares of sum 1: none below `floor` over their number, and of sum exactly 1.

    Units go out by largest remainder; of equal remainders the first groups get them.
    """
    least = floor / len(shares)
    wanted = UNITS * (least + (1.0 - floor) * shares)
    units = np.floor(wanted)
    missing = UNITS - int(units.sum())
    units[np.argsort(units - wanted, kind="stable")[:missing]] += 1
    return [float(one) for one in units / UNITS]
