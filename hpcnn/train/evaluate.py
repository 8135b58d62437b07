"""Accuracy and loss on a test set, its images shared out over the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hpcnn.data import DataSet
from hpcnn.data.loader import evaluation_batches
from hpcnn.parallel.program import Program
from hpcnn.train.setup import batch_part


@dataclass(frozen=True)
class Score:
    """What a test set says of a model."""

    accuracy: float
    loss: float
    num_samples: int


def evaluate(program: Program, data: DataSet, batch: int) -> Score:
    """Return the score over all images of `data`, equal on all ranks (collective).

    Parameters
    ----------
    batch : int
        Images of one forward pass, over all ranks; the last may hold fewer, and a rank may have none at all.

    Raises
    ------
    DataError
        On every rank, when any rank cannot read its part.
    """
    world = program.world
    totals = np.zeros(1 + len(program.losses))  # correct answers, and the loss in parts that are summed apart
    parts = evaluation_batches(data, batch, lambda size: batch_part(program, size))
    for _ in range(0, len(data), batch):
        with world.agreeing():
            part = next(parts)
        context = program.context(training=False, seed=0, step=0, samples=part.samples, global_batch=len(data))
        totals[0] += program.evaluate(part.images, part.labels, context)[1]
        totals[1:] += program.losses
    program.sum_over_ranks(totals)
    return Score(accuracy=float(totals[0]) / len(data), loss=math.fsum(totals[1:]), num_samples=len(data))
