"""Times computation on all ranks at once, fairly where ranks have less than a core.

A control group's quota lets short work run at full speed and then holds the process back until the next period: what
is timed for a moment looks faster than it is when it goes on. Where a rank computes on one thread its processor time
is taken instead, and multiplied by how much longer than that long work lasts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from hpcnn import ops
from hpcnn.comm.collectives import allreduce
from hpcnn.comm.world import World

USE_UP_S, CALIBRATION_S = 0.3, 3.0
"""What is left of a quota is used up first, and then many of its periods pass, which last a tenth of a second."""


class Stopwatch:
    """Times functions on all ranks together (collective to create and to use).

    Parameters
    ----------
    world : World
        The ranks.

    Attributes
    ----------
    world : World
        The ranks.
    stretch : float
        Seconds on the clock of a processor second, while all ranks compute; 0 where threads make them incomparable.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.stretch = 0.0
        if os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip() == "1":
            self.stretch = self.slowest([_stretch()])[0]

    def slowest(self, numbers: Sequence[float]) -> list[float]:
        """Return, of each number, the largest of all ranks' (collective)."""
        table = np.zeros((self.world.size, len(numbers)))
        table[self.world.rank] = numbers
        allreduce(self.world.comm, table, "butterfly")
        return [float(value) for value in table.max(axis=0)]

    def seconds(self, calls: Sequence[Callable[[], object]], *, at_least_s: float = 0.1) -> list[float]:
        """Return the seconds of each function, called in turn, on the rank where it takes longest (collective).

        Parameters
        ----------
        calls : sequence of function
            Called once before, and then in turn until `at_least_s` have gone by, three times at least; on one rank
            more often than on another, so they send no messages.
        """
        for call in calls:
            call()
        self.world.barrier()
        clock = time.process_time if self.stretch else time.perf_counter
        times: list[list[float]] = [[] for _ in calls]
        begin, rounds = time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - begin < at_least_s:
            for call, found in zip(calls, times, strict=True):
                before = clock()
                call()
                found.append(clock() - before)
            rounds += 1
        return [(self.stretch or 1.0) * value for value in self.slowest([statistics.median(some) for some in times])]


def _stretch() -> float:
    """Return how many seconds go by while a processor second is computed."""
    x, filters = np.ones((1, 28, 28, 64), np.float32), np.ones((64, 3, 3, 64), np.float32)
    begin = time.perf_counter()
    while time.perf_counter() - begin < USE_UP_S:
        ops.conv2d_forward(x, filters, padding=1)
    begin, processor = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < CALIBRATION_S:
        ops.conv2d_forward(x, filters, padding=1)
    return (time.perf_counter() - begin) / (time.process_time() - processor)
