"""How long a training step takes: forward, loss, backward, exchange and update of a model on random images.

Where PyTorch is installed and there is one rank, the same model in PyTorch takes its step in turn with ours, in the
same process and on as many threads, so that a slow minute of the machine falls on both.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from hpcnn import configuration, rng
from hpcnn.analysis.torch_twin import TorchTwin
from hpcnn.arrays import Shape
from hpcnn.comm.world import World
from hpcnn.data import open_data
from hpcnn.geometry import Block
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.parallel.reproducible import ReproducibleProgram
from hpcnn.plan.exchanges import choose_buckets
from hpcnn.plan.planner import make_plan
from hpcnn.train import optimizers


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """One model's step, over all ranks; times are medians in seconds, of the slowest rank where there are several."""

    model: str
    ranks: int
    global_batch: int
    repeats: int
    step_s: float
    fastest_s: float
    compute_s: float
    exchange_s: float
    update_s: float
    peer_s: float | None
    peer_fastest_s: float | None
    loss_difference: float | None
    reproducible_s: float | None = None

    @property
    def images_per_second(self) -> float:
        """Samples of the global batch by the median step."""
        return self.global_batch / self.step_s

    @property
    def speedup(self) -> float | None:
        """Peer's median over ours; None without a peer."""
        return None if self.peer_s is None else self.peer_s / self.step_s

    @property
    def reproducible_cost(self) -> float | None:
        """Median of the reproducible step by ours; None where it was not timed."""
        return None if self.reproducible_s is None else self.reproducible_s / self.step_s


class OwnStep:
    """A training step of ours on one random batch, phase by phase.

    Parameters
    ----------
    preset : str
        Names the model and its recipe; dropout is off, so that a peer can be compared.
    global_batch : int
        Samples over all ranks.
    world : World
        The ranks; each takes its share of the batch.
    num_shards : int
        Virtual shards of a reproducible run; 0: an ordinary one.
    """

    def __init__(self, preset: str, global_batch: int, world: World, num_shards: int = 0) -> None:
        config = configuration.load(preset)
        with closing(open_data(config.data, "train")) as data:
            model = dataclasses.replace(config.model, dropout=0.0)
            self.spec = models.configured(model, data.image_shape, data.num_classes)
        self.recipe = config.train
        self.images, self.labels = random_batch(data.image_shape, data.num_classes, global_batch)
        self.model = Model(self.spec, seed=config.train.seed)
        plan = make_plan(self.spec, "data", world.size, global_batch)
        # Waiting at the step's end: all that belongs to a step is timed with it.
        settings = dataclasses.replace(config.exchange, wait="step")
        buckets = choose_buckets(
            self.spec, settings.kind, bucket_bytes=settings.bucket_bytes, ranks=world.size, global_batch=global_batch
        )
        exchange = make_exchange(
            settings, self.spec, plan, buckets, self.model.parameters, world, num_shards=num_shards
        )
        self._world = world
        self._program = (
            ReproducibleProgram(self.model, plan, world, exchange, num_shards=num_shards)
            if num_shards
            else Program(self.model, plan, world, exchange)
        )
        self._share = slice(*self._program.route(global_batch).labels)
        self._optimizer = optimizers.build(config.train, self.model.parameters)

    def __call__(self, step: int) -> tuple[float, float, float, float]:
        """Make one step and return its loss (this rank's share) and the seconds of compute, exchange and update."""
        program, share = self._program, self._share
        context = program.context(
            training=True,
            seed=self.recipe.seed,
            step=step,
            samples=np.arange(len(self.images)),
            global_batch=len(self.images),
        )
        update = TimedUpdate(self._optimizer, step)
        before, begin = self._world.communication, time.perf_counter()
        loss, _ = program.train_step(self.images[share], self.labels[share], context, update)
        step_s = time.perf_counter() - begin
        exchange_s = (self._world.communication - before).exposed_s
        return loss, step_s - exchange_s - update.seconds, exchange_s, update.seconds


class TimedUpdate:
    """Moves parameters at a fixed rate and adds up the time it takes."""

    together = False

    def __init__(self, optimizer: optimizers.Optimizer, step: int) -> None:
        self.seconds = 0.0
        self._optimizer = optimizer
        self._step = step

    def look(self, counted: Sequence[Block]) -> None:
        """Do nothing: no update depends on others."""

    def move(self, block: Block) -> None:
        """Update a stretch of the flat vector."""
        begin = time.perf_counter()
        self._optimizer.update(LEARNING_RATE, self._step, block.start, block.stop)
        self.seconds += time.perf_counter() - begin


# Small: repeated steps on one batch stay finite, and the weights of ours and the peer's stay close.
LEARNING_RATE = 1e-3

# OpenMP threads go on spinning for a while after their work; before the other side's turn they may fall asleep.
PAUSE_S = 0.02


def random_batch(shape: Shape, classes: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return normal images (count, H, W, C), float32, and labels (count,), equal on every rank."""
    draw = rng.generator(1, "bench step")
    return draw.standard_normal((count, *shape), dtype=np.float32), draw.integers(0, classes, count)


def time_step(
    preset: str, *, global_batch: int, repeats: int, world: World, peer: bool = True, num_shards: int = 0
) -> StepTiming:
    """Return the timing of one model's step (collective).

    Parameters
    ----------
    preset : str
        Model and recipe.
    global_batch, repeats : int
        Samples a step over all ranks; timed steps, after one that is not timed.
    world : World
        The ranks.
    peer : bool
        Time PyTorch too, if it is installed and there is one rank.
    num_shards : int
        Also time the step of a reproducible run, in so many virtual shards; 0: not.

    Raises
    ------
    PlanError
        If there are fewer shards than ranks, or samples than shards.
    """
    own = OwnStep(preset, global_batch, world)
    sharded = OwnStep(preset, global_batch, world, num_shards) if num_shards else None
    other = _peer_step(own, world.num_threads) if peer and world.size == 1 else None
    first_loss = own(0)[0]
    loss_difference = abs(other() - first_loss) / abs(first_loss) if other else None
    phases, peer_times, sharded_times = [], [], [0.0] * repeats
    if sharded:
        sharded(0)
    for repeat in range(repeats):
        time.sleep(PAUSE_S)
        world.barrier()
        phases.append(own(repeat + 1)[1:])
        if sharded:
            world.barrier()
            sharded_times[repeat] = sum(sharded(repeat + 1)[1:])
        if other:
            time.sleep(PAUSE_S)
            begin = time.perf_counter()
            other()
            peer_times.append(time.perf_counter() - begin)
    steps = np.array(world.comm.allgather([sum(phase) for phase in phases])).max(axis=0)
    sharded_steps = np.array(world.comm.allgather(sharded_times)).max(axis=0)
    compute_s, exchange_s, update_s = (float(value) for value in np.median(np.array(phases), axis=0))
    return StepTiming(
        model=preset,
        ranks=world.size,
        global_batch=global_batch,
        repeats=repeats,
        step_s=float(np.median(steps)),
        fastest_s=float(steps.min()),
        compute_s=compute_s,
        exchange_s=exchange_s,
        update_s=update_s,
        peer_s=statistics.median(peer_times) if peer_times else None,
        peer_fastest_s=min(peer_times, default=None),
        loss_difference=loss_difference,
        reproducible_s=float(np.median(sharded_steps)) if sharded else None,
    )


def _peer_step(own: OwnStep, num_threads: int) -> Callable[[], float] | None:
    """Return a function that makes PyTorch's step on the same batch and returns its loss; None without PyTorch."""
    try:
        import torch

        torch.set_num_threads(num_threads)
        twin = TorchTwin(own.spec, momentum=own.recipe.momentum, weight_decay=own.recipe.weight_decay)
    except ImportError:
        return None
    twin.load(own.model.parameters, own.model.statistics)
    return lambda: twin.step(own.images, own.labels, LEARNING_RATE)
