"""Schedules of all ranks, run on plain arrays in one process and without MPI."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcnn.plan.schedules import Schedule


def interpret(ranks: Sequence[Schedule], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the arrays after all ranks have run their schedules in lock step; the given ones stay as they are."""
    arrays = [array.copy() for array in arrays]
    for steps in zip(*(schedule.steps for schedule in ranks), strict=True):
        mail: dict[tuple[int, int], list[np.ndarray]] = {}
        for rank, step in enumerate(steps):
            for peer, start, stop in step.sends:
                mail.setdefault((rank, peer), []).append(arrays[rank][start:stop].copy())
        for rank, step in enumerate(steps):
            for peer, start, stop in step.receives:
                arrived = mail[peer, rank].pop(0)
                if step.combine == "sum":
                    arrays[rank][start:stop] += arrived
                else:
                    arrays[rank][start:stop] = arrived
        for rank, step in enumerate(steps):
            for start, stop, source in step.additions:
                arrays[rank][start:stop] += arrays[rank][source : source + stop - start]
        assert not any(mail.values()), "messages that nobody receives"
    return arrays
