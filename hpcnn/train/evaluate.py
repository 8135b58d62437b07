"""Accuracy and loss on a test set, its images shared out over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpcnn.arrays import Array
from hpcnn.comm.collectives import allreduce
from hpcnn.data import DataSet
from hpcnn.data.loader import evaluation_batches
from hpcnn.parallel.program import Program
from hpcnn.parallel.whole import Whole
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train.groups import Groups
from hpcnn.train.setup import Parts, batch_part


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


def collect(
    program: Program, data: DataSet, batch: int, columns: int, compute: Callable[[Array, Array], np.ndarray]
) -> np.ndarray:
    """Return some numbers for each image of `data`, float64 (images, columns), equal on all ranks (collective).

    Parameters
    ----------
    batch : int
        Images of one forward pass, over all ranks.
    compute : callable
        Returns the numbers, (n, columns), of n samples from their logits and features.

    Raises
    ------
    DataError
        On every rank, when any rank cannot read its part.
    """
    rows = np.zeros((len(data), columns))
    parts = evaluation_batches(data, batch, lambda size: batch_part(program, size))
    for start in range(0, len(data), batch):
        with program.world.agreeing():
            part = next(parts)
        context = program.context(training=False, seed=0, step=0, samples=part.samples, global_batch=len(data))
        logits, features = program.features(part.images, context)
        own = batch_part(program, len(part.samples)).labels
        if own.size:
            rows[start + own.start : start + own.stop] = compute(logits, features)
    program.sum_over_ranks(rows)
    return rows


def restore(parts: Parts, loaded: checkpoints.Checkpoint | None) -> None:
    """Put parameters and statistics that rank 0 has read into every rank (collective).

    Raises
    ------
    CheckpointError
        On every rank, if they are of another model.
    """
    world, model = parts.world, parts.model
    whole = Whole(model, parts.program.plan, world)
    room = whole.room({}, model.statistics)
    with world.agreeing():
        if loaded is not None:
            checkpoints.restore_into(
                loaded, model=model.spec.name, parameters=room.parameters, statistics=room.statistics
            )
    for array in (room.parameters.values, *room.statistics.values()):
        world.broadcast(array)
    whole.take(room, {})
