"""Every way for gradients to travel trains the same network as one process that has the whole batch."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.comm import World
from hpcnn.comm.library import load
from hpcnn.config import Config
from hpcnn.errors import NumericsError
from hpcnn.geometry import split
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.plan.exchanges import KINDS, choose_buckets
from hpcnn.plan.planner import make_plan
from hpcnn.train import optimizers
from hpcnn.train.update import StepUpdate
from tests.checks import spmd_assert
from tests.worlds import alone, world

BATCH = 13  # uneven on 2 to 5 ranks
KINDS_AND_AUTO = (*KINDS, "auto")
ALGORITHMS = ("auto", "butterfly", "halving-doubling", "ring", "hierarchical", "mpi")


class Result(NamedTuple):
    values: np.ndarray
    state: dict[str, np.ndarray]
    program: Program


def make(on: World, config: Config, dtype: type = np.float32) -> Program:
    shape = (28, 28, 1) if config.model.name == "lenet5" else (16, 16, 3)
    spec = models.build(config.model.name, shape, 10, 0.3)
    model = Model(spec, 3, dtype)
    plan = make_plan(spec, "data", on.size, BATCH)
    buckets = choose_buckets(
        spec,
        config.exchange.kind,
        bucket_bytes=config.exchange.bucket_bytes,
        ranks=on.size,
        global_batch=BATCH,
        nodes=on.engine.nodes,
    )
    exchange = make_exchange(config.exchange, spec, plan, buckets, model.parameters, on)
    return Program(model, plan, on, exchange)


def train(on: World, *overrides: str, steps: int = 20, dtype: type = np.float32, scale: float = 1.0) -> Result:
    """Return what `steps` steps on random images make of the parameters and, on rank 0, of the optimizer's state."""
    config = configuration.load("lenet5", ["exchange.bucket_bytes=50000", *overrides])
    program = make(on, config, dtype)
    optimizer = optimizers.build(config.train, program.model.parameters)
    part = split(BATCH, on.size, on.rank)
    share = slice(part.start, part.stop)
    draw = np.random.default_rng(5)
    for step in range(steps):
        images = scale * draw.standard_normal((BATCH, *program.model.spec.input_shape)).astype(dtype)
        labels = draw.integers(0, 10, BATCH)
        context = program.context(training=True, seed=1, step=step, samples=np.arange(BATCH), global_batch=BATCH)
        update = StepUpdate(
            optimizer,
            config.train.lr,
            step,
            clip_norm=config.train.clip_norm,
            whole_tensors=program.exchange.owns_whole_tensors,
            sum_over_ranks=program.sum_over_ranks,
        )
        program.train_step(images[share], labels[share], context, update)
    program.exchange.settle()
    for slot in optimizer.state.values():
        program.exchange.collect(slot)
    return Result(program.model.parameters.values.copy(), optimizer.state, program)


RECIPES = {
    "momentum": ("train.optimizer=sgd", "train.lr=0.02", "train.weight_decay=1e-3"),
    "adam": ("train.optimizer=adam", "train.lr=1e-4"),
    "lars": ("train.optimizer=lars", "train.lr=0.5", "train.weight_decay=1e-3"),
    "clipped": ("train.optimizer=sgd", "train.lr=0.02", "train.clip_norm=0.5"),
}


@cache
def serial(recipe: str, dtype: type = np.float32, model: str = "lenet5", steps: int = 20) -> Result:
    return train(alone(), *RECIPES[recipe], f"model.name={model}", dtype=dtype, steps=steps)


def distance(x: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def assert_equal_training(found: Result, expected: Result, tolerance: float) -> None:
    spmd_assert(world().comm, distance(found.values, expected.values) < tolerance)
    if world().rank == 0:
        for slot, array in found.state.items():
            assert distance(array, expected.state[slot]) < 20 * tolerance, slot


@pytest.mark.parametrize("recipe", ["momentum", "adam"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", KINDS_AND_AUTO)
def test_every_kind_by_every_algorithm_trains_as_one_process_does(kind, algorithm, recipe):
    settings = (f"exchange.kind={kind}", f"exchange.algorithm={algorithm}")
    assert_equal_training(train(world(), *RECIPES[recipe], *settings), serial(recipe), 1e-5)


@pytest.mark.parametrize("recipe", ["lars", "clipped"])
@pytest.mark.parametrize("kind", KINDS_AND_AUTO)
def test_updates_that_look_at_all_gradients_train_as_one_process_does(kind, recipe):
    assert_equal_training(train(world(), *RECIPES[recipe], f"exchange.kind={kind}"), serial(recipe), 1e-5)


@pytest.mark.parametrize("kind", KINDS_AND_AUTO)
def test_in_double_precision_the_kinds_agree_to_rounding(kind):
    found = train(world(), *RECIPES["momentum"], f"exchange.kind={kind}", dtype=np.float64)
    assert_equal_training(found, serial("momentum", np.float64), 1e-12)


@pytest.mark.parametrize("kind", KINDS_AND_AUTO)
def test_residual_networks_with_batchnorm_train_as_one_process_does(kind):
    settings = (*RECIPES["momentum"], "model.name=resnet20", f"exchange.kind={kind}")
    found = train(world(), *settings, dtype=np.float64, steps=3)
    assert_equal_training(found, serial("momentum", np.float64, "resnet20", 3), 1e-9)


@pytest.mark.parametrize("setting", ["exchange.overlap=false", "exchange.wait=step", "exchange.bucket_bytes=1"])
@pytest.mark.parametrize("kind", KINDS)
def test_when_and_in_what_portions_gradients_travel_changes_no_bit(kind, setting):
    first, second = (
        train(world(), *RECIPES["momentum"], "exchange.algorithm=butterfly", f"exchange.kind={kind}", *more).values
        for more in ((), (setting,))
    )
    # The tree of a reduce-scatter's sum depends on the slice, that of an all-reduce does not.
    same = np.array_equal(first, second) if "bytes" not in setting or kind == "allreduce" else True
    spmd_assert(world().comm, same and distance(second, first) < 1e-6)


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
@pytest.mark.parametrize("algorithm", ["butterfly", "halving-doubling", "ring", "hierarchical"])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_messages_leave_equal_bits_on_all_ranks_and_little_error(kind, algorithm, wire):
    settings = (f"exchange.kind={kind}", f"exchange.algorithm={algorithm}", f"exchange.wire={wire}")
    values = train(world(), *RECIPES["momentum"], *settings, steps=5).values
    spmd_assert(world().comm, len(set(world().comm.allgather(values.tobytes()))) == 1)
    exact = train(alone(), *RECIPES["momentum"], steps=5).values
    error = distance(values, exact)
    spmd_assert(world().comm, error < 3e-3 and (error > 1e-7 or world().size == 1))


def test_the_shares_that_ranks_count_cover_every_parameter_once():
    for kind in KINDS_AND_AUTO:
        program = make(world(), configuration.load("lenet5", [f"exchange.kind={kind}"]))
        counted = np.zeros(program.model.parameters.values.size)
        updated = np.zeros_like(counted)
        for carrier in program.exchange.carriers:
            for first, last in carrier.counted:
                counted[first:last] += 1
            for first, last in carrier.owned:
                updated[first:last] += 1
        world().comm.Allreduce(load().IN_PLACE, counted)
        assert np.all(counted == 1)
        assert np.all(updated <= 1)


def test_a_rank_updates_only_its_slice_when_sharded():
    program = make(world(), configuration.load("lenet5", ["exchange.kind=sharded"]))
    mine = sum(block.size for block in program.exchange.owned)
    assert abs(mine - program.model.parameters.values.size / world().size) <= len(program.exchange.carriers)


def test_a_gradient_that_is_no_number_is_refused_by_all_ranks_when_clipping():
    with pytest.raises(NumericsError, match=r"clip: the norm of the gradient is"):
        train(world(), *RECIPES["clipped"], "exchange.kind=sharded", scale=float("inf"), steps=1)


def test_the_engine_is_quiet_when_training_is_over():
    train(world(), *RECIPES["momentum"], "exchange.kind=factors", steps=2)
    assert world().engine.idle
    before = world().communication
    after = world().communication - before
    assert dataclasses.astuple(after.traffic) == (0, 0)
    assert after.exposed_s == after.hidden_s == 0.0
