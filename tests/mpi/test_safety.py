"""Runs whose numbers go wrong on the way: they stop, naming who, or go back and end as if nothing had been."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.comm import World, start
from hpcnn.data.synthetic import SyntheticDataSet
from hpcnn.errors import DivergenceError, NumericsError, PlanError
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train import setup
from hpcnn.train.setup import assemble
from hpcnn.train.trainer import Trainer
from tests.checks import spmd_assert

RECIPE = (
    *("data.source=synthetic", "data.num_samples=100", "data.image_shape=[28,28,1]", "train.global_batch=10"),
    *("train.steps=8", "train.lr=0.02", "checkpoint.every_epochs=0", "checkpoint.every_steps=3", "checkpoint.keep=9"),
)
ROLLBACK = ("train.on_nan=rollback", "train.on_divergence=rollback", "train.rollback_lr=1.0", "train.max_rollbacks=1")
FAULT_STEP = 5
Fault = Callable[[Trainer], None]


@pytest.fixture
def world() -> World:
    return start()


def train(world: World, folder: Path, *overrides: str, fault: Fault | None = None, times: int = 1) -> Trainer:
    """Train; before step FAULT_STEP, the first few times that it comes, a fault befalls the ranks."""
    config = configuration.load("lenet5", [*RECIPE, *overrides])
    trainer = Trainer(assemble(config, world), folder, progress_stream=io.StringIO(), result_stream=io.StringIO())
    trainer.prepare()
    step, left = trainer._step, times

    def faulty(*args):
        nonlocal left
        if fault is not None and left and trainer.step == FAULT_STEP - 1:
            left -= 1
            trainer.program.exchange.settle()
            fault(trainer)
        return step(*args)

    trainer._step = faulty  # type: ignore[method-assign]
    trainer.train()
    return trainer


def not_a_number(trainer: Trainer) -> None:
    """What an update of infinite length leaves, on all ranks; in a lower layer a ReLU would hide it."""
    trainer.parts.model.parameters.values[-5:] = np.nan


def flip(rank: int) -> Fault:
    """One bit of one weight on one rank."""

    def fault(trainer: Trainer) -> None:
        if trainer.world.rank == rank:
            trainer.parts.model.parameters["conv2/weight"].value.reshape(-1).view(np.uint32)[3] ^= np.uint32(1 << 20)

    return fault


def records(folder: Path, event: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.mark.parametrize(
    "settings",
    [
        ("exchange.kind=sharded", "exchange.bucket_bytes=20000"),
        ("exchange.kind=allreduce", "train.clip_norm=0.5"),  # the gradient is refused before the loss is
        ("exchange.lazy_layers=2", "exchange.lazy_steps=3", "train.optimizer=adam", "train.lr=0.001"),
        ("plan.preset=hybrid",),
    ],
    ids=lambda settings: settings[0],
)
def test_a_run_rolled_back_ends_with_the_bits_of_one_that_nothing_befell(world, folder, settings) -> None:
    calm = train(world, folder / "calm", *settings)
    rough = train(world, folder / "rough", *settings, *ROLLBACK, fault=not_a_number)
    same = (calm.parts.model.parameters.values == rough.parts.model.parameters.values).all()
    spmd_assert(world.comm, same, "other parameters")
    if world.rank == 0:
        (record,) = records(folder / "rough", "rollback")
        assert (3, FAULT_STEP - 1) == (record["step"], record["from_step"])
        assert list(range(1, 9)) == [record["step"] for record in records(folder / "rough", "step")]
        calm_losses, losses = ([one["loss"] for one in records(folder / name, "step")] for name in ("calm", "rough"))
        assert calm_losses == losses


def test_a_rollback_lowers_the_rate_and_the_checkpoints_remember_it(world: World, folder: Path) -> None:
    settings = (
        *ROLLBACK,
        "train.rollback_lr=0.5",
        "train.max_rollbacks=2",
        "train.schedule=constant",
        "train.warmup_epochs=0",
    )
    trainer = train(world, folder / "run", *settings, fault=not_a_number, times=2)
    spmd_assert(world.comm, trainer.lr_scale == 0.25, f"the scale is {trainer.lr_scale}")
    if world.rank == 0:
        rates = [record["lr"] for record in records(folder / "run", "step")]
        assert [0.02] * 3 + [0.005] * 5 == pytest.approx(rates)
        assert checkpoints.load(folder / "run" / "final.h5").lr_scale == 0.25


def test_faults_that_come_again_end_the_run_as_do_those_before_the_first_checkpoint(world, folder) -> None:
    with pytest.raises(NumericsError, match=r"must be a finite number.*There have been train.max_rollbacks \(=1\)"):
        train(world, folder / "run", *ROLLBACK, fault=not_a_number, times=2)
    with pytest.raises(NumericsError, match="no checkpoint yet"):
        train(world, folder / "early", *ROLLBACK, "checkpoint.every_steps=0", fault=not_a_number)
    with pytest.raises(NumericsError, match=r"at most train.max_loss \(=1e-06\)"):
        train(world, folder / "high", "train.max_loss=1e-6")


@pytest.mark.parametrize("thing", ["code", "training set"])
def test_ranks_with_other_code_or_images_are_named_before_the_first_step(world, folder, thing, monkeypatch) -> None:
    if world.size == 1:
        pytest.skip("nobody to compare with")
    culprit = world.size - 1
    if thing == "code":
        monkeypatch.setattr(setup, "code_digest", lambda: str(world.rank == culprit))
    elif world.rank == culprit:
        monkeypatch.setattr(SyntheticDataSet, "fingerprint", lambda self: "0123456789abcdef")
    with pytest.raises(PlanError, match=rf"rank {culprit} \(host .*\) has another {thing} than rank 0; all ranks must"):
        train(world, folder / "run")


@pytest.mark.parametrize("plan", ["data", "hybrid"])
def test_a_flipped_bit_names_its_rank_before_it_is_saved_and_can_be_rolled_back(world, folder, plan) -> None:
    if world.size == 1:
        pytest.skip("nobody to compare with")
    culprit = world.size - 1
    settings = (f"plan.preset={plan}", "exchange.kind=allreduce")
    with pytest.raises(DivergenceError) as caught:
        train(world, folder / "stop", *settings, fault=flip(culprit))
    words = str(caught.value)
    assert "after step 6" in words
    assert "conv2/weight" in words
    if world.size > 2:
        assert f"rank {culprit} (host" in words
        assert "has other parameters than most ranks" in words
    else:
        assert "no majority" in words
    world.barrier()
    if world.rank == 0:
        assert [3] == [int(path.stem[5:]) for path in (folder / "stop" / "checkpoints").iterdir()]
    settings += ("train.check_every_steps=1",)
    calm, rough = (
        train(world, folder / "calm", *settings),
        train(world, folder / "rough", *settings, *ROLLBACK, fault=flip(culprit)),
    )
    same = (calm.parts.model.parameters.values == rough.parts.model.parameters.values).all()
    spmd_assert(world.comm, same, "other parameters")
    spmd_assert(world.comm, rough.lr_scale == 1.0, "a fault of the machine is no reason for a lower rate")
