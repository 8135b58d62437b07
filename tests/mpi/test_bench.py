"""The training-step benchmark, on as many ranks as there are."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from hpcnn.analysis.bench_step import OwnStep, time_step
from hpcnn.comm import start
from hpcnn.nn.model import Model
from tests.serial import context, loss_and_gradients


def test_step_timing_adds_up() -> None:
    world = start()
    before = world.communication
    timing = time_step("lenet5", global_batch=10, repeats=3, world=world, peer=False)
    assert (timing.model, timing.ranks, timing.global_batch) == ("lenet5", world.size, 10)
    assert 0.0 < timing.fastest_s <= timing.step_s
    assert timing.images_per_second == pytest.approx(10 / timing.step_s)
    assert timing.compute_s > 0.0
    assert timing.update_s > 0.0
    assert timing.exchange_s >= 0.0
    spent = world.communication - before  # all of it may hide in the median step
    assert (spent.exposed_s + spent.hidden_s > 0.0) == (world.size > 1)
    assert timing.compute_s + timing.exchange_s + timing.update_s < 3.0 * timing.step_s
    assert timing.peer_s is None
    assert timing.speedup is None
    assert timing.reproducible_cost is None


def test_reproducible_steps_are_timed_in_turn_and_compute_the_same_loss() -> None:
    world = start()
    timing = time_step("lenet5", global_batch=16, repeats=2, world=world, peer=False, num_shards=8)
    assert timing.reproducible_cost is not None
    assert timing.reproducible_cost > 0.0
    losses = [world.comm.allreduce(OwnStep("lenet5", 16, world, shards)(0)[0]) for shards in (0, 8)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_timed_step_computes_the_loss_of_the_whole_batch_and_trains() -> None:
    world = start()
    step = OwnStep("lenet5", 10, world)
    expected, _, _ = loss_and_gradients(Model(step.spec, step.recipe.seed), step.images, step.labels, context(10))
    losses = np.array(world.comm.allgather([step(number)[0] for number in range(4)])).sum(axis=0)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert np.all(np.diff(losses) < 0.0)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_peer_computes_the_same_loss() -> None:
    world = start()
    timing = time_step("lenet5", global_batch=8, repeats=2, world=world)
    if world.size > 1:
        assert timing.peer_s is None
    else:
        assert timing.loss_difference < 1e-5
        assert timing.peer_s > 0.0
