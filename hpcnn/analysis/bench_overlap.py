"""How much communication hides behind computation: a training step, beside its two halves run alone.

In turns, so that a slow minute of the machine falls on all three: steps as they are trained; the same steps with
messages left out; the same messages with nothing to compute. A step can at best take as long as the longer half.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from hpcnn.analysis.bench_step import TimedUpdate, random_batch
from hpcnn.comm.collective import Collective
from hpcnn.comm.world import World
from hpcnn.config import Config
from hpcnn.geometry import split
from hpcnn.parallel.program import Program
from hpcnn.train import optimizers
from hpcnn.train.groups import config_of_group
from hpcnn.train.setup import assemble


@dataclass(frozen=True, kw_only=True)
class OverlapTiming:
    """Steps of one configuration; seconds of a step on the slowest rank, medians over the repeats."""

    model: str
    kind: str
    algorithm: str
    overlap: bool
    ranks: int
    global_batch: int
    repeats: int
    step_s: float
    compute_s: float
    """The same step without messages."""
    comm_s: float
    """The same messages alone."""
    num_bytes: int
    """Sent by the busiest rank in a step."""

    @property
    def hidden_share(self) -> float:
        """Part of the messages' time that a step does not show."""
        shown_s = max(0.0, self.step_s - self.compute_s)
        return max(0.0, 1.0 - shown_s / self.comm_s) if self.comm_s else 1.0

    @property
    def ratios(self) -> dict[str, float]:
        """Both ratios by name, for files."""
        return {"hidden_share": self.hidden_share, "over_longer": self.over_longer}

    @property
    def over_longer(self) -> float:
        """Step over the longer of its halves: 1 is the best there can be."""
        return self.step_s / max(self.compute_s, self.comm_s)


def time_overlap(config: Config, world: World, *, steps: int = 4, repeats: int = 3) -> OverlapTiming:
    """Return the timing of a configuration's steps on random images (collective).

    Parameters
    ----------
    config : Config
        Model, batch and exchange.
    world : World
        The ranks.
    steps, repeats : int
        Steps in a row that are timed, after one that fills the pipeline; how often.
    """
    parts = assemble(config_of_group(config, 1), world)
    try:
        program = parts.program
        collectives = [c for carrier in program.exchange.carriers for c in (*carrier.reducing, *carrier.publishing)]
        loop = _Loop(config, program, world)
        loop.run(1)  # memory, primitives
        times = np.empty((repeats, 3))
        sent = 0
        for repeat in range(repeats):
            before = world.communication.traffic.num_bytes
            times[repeat, 0] = loop.run(steps)
            sent = (world.communication.traffic.num_bytes - before) // (steps + 1)
            with _left_out(collectives):
                times[repeat, 1] = loop.run(steps)
            times[repeat, 2] = _messages_alone(collectives, world, steps)
    finally:
        parts.close()
    slowest = np.array(world.comm.allgather(times)).max(axis=0)
    step_s, compute_s, comm_s = (float(value) for value in np.median(slowest, axis=0))
    return OverlapTiming(
        model=config.model.name,
        kind=config.exchange.kind,
        algorithm=config.exchange.algorithm,
        overlap=config.exchange.overlap,
        ranks=world.size,
        global_batch=config.train.global_batch,
        repeats=repeats,
        step_s=step_s,
        compute_s=compute_s,
        comm_s=comm_s,
        num_bytes=max(world.comm.allgather(sent)),
    )


class _Loop:
    """Training steps on one random batch, at a rate so small that nothing changes much."""

    def __init__(self, config: Config, program: Program, world: World) -> None:
        self._program = program
        self._world = world
        self._optimizer = optimizers.build(config.train, program.model.parameters)
        spec = program.model.spec
        images, labels = random_batch(spec.input_shape, program.operations[-1].layer.spec.output_shape[-1], 1)
        share = split(config.train.global_batch, world.size, world.rank)
        self._images = np.repeat(images, share.size, axis=0)
        self._labels = np.repeat(labels, share.size)
        self._context = program.context(
            training=True,
            seed=config.train.seed,
            step=0,
            samples=np.arange(config.train.global_batch),
            global_batch=config.train.global_batch,
        )

    def run(self, steps: int) -> float:
        """Return the mean seconds of `steps` steps, after one that is not timed (collective)."""
        self._world.barrier()
        begin = 0.0
        for step in range(steps + 1):
            if step == 1:
                begin = time.perf_counter()
            update = TimedUpdate(self._optimizer, step)
            self._program.train_step(self._images, self._labels, self._context, update)
        seconds = (time.perf_counter() - begin) / steps
        self._program.exchange.settle()
        return seconds


@contextmanager
def _left_out(collectives: list[Collective]) -> Iterator[None]:
    """Let collectives be done as soon as they are started, without a message."""
    for collective in collectives:
        collective.start = lambda: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for collective in collectives:
            del collective.start


def _messages_alone(collectives: list[Collective], world: World, steps: int) -> float:
    """Return the mean seconds of all of a step's collectives, in flight together."""
    world.barrier()
    begin = time.perf_counter()
    for _ in range(steps):
        for collective in collectives:
            collective.start()
        for collective in collectives:
            collective.wait()
    return (time.perf_counter() - begin) / steps
