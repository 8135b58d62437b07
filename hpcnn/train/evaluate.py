"""Accuracy and loss on a test set, its images shared out over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpcnn.comm.collectives import allreduce
from hpcnn.data import DataSet
from hpcnn.data.loader import evaluation_batches
from hpcnn.parallel.program import Program
from hpcnn.train.groups import Groups
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
    totals = np.zeros(2)
    parts = evaluation_batches(data, batch, lambda size: batch_part(program, size))
    for _ in range(0, len(data), batch):
        with world.agreeing():
            part = next(parts)
        context = program.context(training=False, seed=0, step=0, samples=part.samples, global_batch=len(data))
        totals += program.evaluate(part.images, part.labels, context)
    program.sum_over_ranks(totals)
    return Score(accuracy=float(totals[1]) / len(data), loss=float(totals[0]), num_samples=len(data))


def evaluate_shares(program: Program, groups: Groups, data: DataSet, batch: int) -> Score:
    """Return the score over the images of all groups, each of which brings its own `data` (collective).

    Other parameters and errors are those of `evaluate`.
    """
    with groups.world.agreeing():
        score = evaluate(program, data, batch)
    if groups.across is None:
        return score
    n = score.num_samples
    totals = np.array([round(score.accuracy * n), score.loss * n, n])
    allreduce(groups.across.comm, totals, "butterfly", label="scores of all groups")
    correct, loss, count = totals.tolist()
    return Score(accuracy=correct / count, loss=loss / count, num_samples=round(count))
