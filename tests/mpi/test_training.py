"""Training gives one curve, on however many ranks it runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.comm import World, start
from hpcnn.comm.library import load, node_share
from hpcnn.errors import CheckpointError, ConfigError, NumericsError, PlanError
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train.outcome import Outcome
from hpcnn.train.setup import assemble
from hpcnn.train.trainer import Trainer
from tests.checks import spmd_assert

LENET = ("train.global_batch=25", "model.dropout=0.3", "train.lr=0.02", "train.warmup_epochs=0")
RESNET = (
    *("model.name=resnet20", "data.source=synthetic", "data.num_samples=400", "train.global_batch=17"),
    *("model.dropout=0.2", "data.crop_padding=4", "data.flip=true", "train.lr=0.02", "train.weight_decay=1e-4"),
)
STATISTICS = [f"norm1/running_{moment}" for moment in ("mean", "var")]


@pytest.fixture
def world() -> World:
    return start()


@pytest.fixture
def alone() -> World:
    """Return a world of this rank only."""
    comm = load().COMM_SELF.Dup()
    return World(comm, node_share(comm), 1)


def make(world: World, folder: Path, *overrides: str, resume: bool = False, init: Path | None = None) -> Trainer:
    config = configuration.load("lenet5", ["checkpoint.every_epochs=0", *overrides])
    trainer = Trainer(assemble(config, world), folder, progress_stream=io.StringIO(), result_stream=io.StringIO())
    trainer.prepare(resume=resume, init=init)
    return trainer


def train(world: World, folder: Path, *overrides: str, resume: bool = False) -> Outcome:
    return make(world, folder, *overrides, resume=resume).train()


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "step"]


# A ReLU that rounding pushes over zero changes the gradients below it by parts in a thousand, and batch norm at a
# usual rate makes the difference grow tenfold every few steps. So ResNet-20 is held to one part in a hundred million
# at a usual rate in float64, where nothing tips over, and to one in a hundred thousand in float32 at a small one.
@pytest.mark.parametrize(
    ("recipe", "steps", "tolerance"),
    [
        ((*LENET,), 30, 1e-5),
        ((*LENET, "train.compute=fp64", "plan.preset=spatial"), 30, 1e-9),  # of cropped and mirrored images in a file
        ((*RESNET, "train.compute=fp64"), 10, 1e-8),
        ((*RESNET, "train.lr=3e-5", "train.global_batch=33"), 12, 1e-5),
    ],
    ids=["lenet5", "lenet5-tiles", "resnet20-fp64", "resnet20-fp32"],
)
def test_the_loss_curve_is_that_of_one_rank(
    world: World, alone: World, folder: Path, recipe: tuple[str, ...], steps: int, tolerance: float
) -> None:
    train(world, folder / "together", *recipe, f"train.steps={steps}")
    worst = 0.0
    if world.rank == 0:
        train(alone, folder / "alone", *recipe, f"train.steps={steps}")
        expected, actual = np.array(losses(folder / "alone")), np.array(losses(folder / "together"))
        assert len(expected) == len(actual) == steps
        worst = float(np.max(np.abs(actual - expected) / expected))
    spmd_assert(world.comm, worst < tolerance, f"the loss curves differ by {worst:.1e}")


@pytest.mark.parametrize("algorithm", ["butterfly", "halving-doubling", "ring", "mpi"])
def test_every_algorithm_gives_the_parameters_of_one_rank(
    world: World, alone: World, folder: Path, algorithm: str
) -> None:
    recipe = (*LENET, "train.steps=6", f"exchange.algorithm={algorithm}", "exchange.bucket_bytes=30000")
    together = make(world, folder / "together", *recipe)
    together.train()
    reference = make(alone, folder / f"alone-{world.rank}", *recipe)
    reference.train()
    actual, expected = together.parts.model.parameters.values, reference.parts.model.parameters.values
    distance = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    spmd_assert(world.comm, distance < 1e-6, f"parameters differ by {distance:.1e}")


def test_all_ranks_hold_the_same_bits_after_training(world: World, folder: Path) -> None:
    trainer = make(world, folder / "run", *RESNET, "train.steps=3")
    trainer.train()
    values = trainer.parts.model.parameters.values
    root = values.copy()
    world.broadcast(root)
    spmd_assert(world.comm, np.array_equal(root, values), "parameters are not those of rank 0")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_a_run_resumed_from_a_checkpoint_of_one_rank_goes_on_as_if_never_stopped(
    world: World, alone: World, folder: Path, optimizer: str
) -> None:
    recipe = (*LENET, f"train.optimizer={optimizer}", "train.lr=0.002", "checkpoint.every_steps=4")
    if world.rank == 0:
        train(alone, folder / "whole", *recipe, "train.steps=9")
        train(alone, folder / "parts", *recipe, "train.steps=9")
        newest = sorted((folder / "parts" / "checkpoints").iterdir())[-1]
        newest.unlink()
        (folder / "parts" / "final.h5").unlink()
    world.barrier()
    train(world, folder / "parts", *recipe, "train.steps=9", resume=True)
    agreed = True
    if world.rank == 0:
        expected, actual = losses(folder / "whole"), losses(folder / "parts")
        agreed = len(expected) == 9 and np.allclose(actual, expected, rtol=1e-5, atol=0)
    spmd_assert(world.comm, agreed, "the resumed curve differs")


@pytest.mark.parametrize(("first", "then"), [("model", "spatial"), ("data", "model"), ("model", "hybrid-rows")])
def test_a_run_goes_on_under_another_plan_with_the_statistics_it_had(
    world: World, alone: World, folder: Path, first: str, then: str
) -> None:
    recipe = (*RESNET, "train.compute=fp64", "data.image_shape=[16,12,3]", "train.steps=5", "checkpoint.every_steps=3")
    train(world, folder / "parts", *recipe, f"plan.preset={first}")
    if world.rank == 0:
        train(alone, folder / "whole", *recipe)
        for newer in (folder / "parts" / "checkpoints" / "step-00000005.h5", folder / "parts" / "final.h5"):
            newer.unlink()
        (folder / "parts" / "best.h5").unlink(missing_ok=True)
    world.barrier()
    trainer = make(world, folder / "parts", *recipe, f"plan.preset={then}", resume=True)
    assert trainer.step == 3
    trainer.train()
    if world.rank == 0:
        found, expected = (checkpoints.load(folder / name / "final.h5") for name in ("parts", "whole"))
        np.testing.assert_allclose(losses(folder / "parts"), losses(folder / "whole"), rtol=1e-8)
        assert found.statistics.keys() == expected.statistics.keys()
        for name, tensor in expected.statistics.items():
            np.testing.assert_allclose(found.statistics[name], tensor, rtol=1e-7, atol=1e-9)
    other = make(world, folder / "other", *recipe, f"plan.preset={then}", init=folder / "parts" / "final.h5")
    untouched = all(np.all(other.parts.model.statistics[name] == name.endswith("var")) for name in STATISTICS)
    spmd_assert(world.comm, untouched, "statistics were taken over with the parameters")


def test_an_evaluation_under_any_plan_uses_the_statistics_of_all_channels(
    world: World, alone: World, folder: Path
) -> None:
    recipe = (*RESNET, "train.compute=fp64", "data.image_shape=[16,12,3]", "train.steps=3")
    score = train(world, folder / "together", *recipe, "plan.preset=model").score
    expected = train(alone, folder / f"alone-{world.rank}", *recipe).score
    assert score is not None
    assert expected is not None
    spmd_assert(world.comm, np.isclose(score.loss, expected.loss, rtol=1e-8), "the test losses differ")


def test_local_statistics_of_cut_channels_are_those_of_the_batch_and_of_tiles_refused(
    world: World, alone: World, folder: Path
) -> None:
    shape = ("train.compute=fp64", "data.image_shape=[16,12,3]")
    local = (*RESNET, *shape, "train.steps=2", "model.sync_batchnorm=false")
    train(world, folder / "model", *local, "plan.preset=model")
    if world.rank == 0:
        train(alone, folder / "alone", *local)
        found, expected = (checkpoints.load(folder / name / "final.h5") for name in ("model", "alone"))
        for name in STATISTICS:
            np.testing.assert_allclose(found.statistics[name], expected.statistics[name], rtol=1e-8)
    if world.size > 1:
        with pytest.raises(PlanError, match=r"is a batch norm with a grid .* Set model\.sync_batchnorm = true"):
            train(world, folder / "spatial", *local, "plan.preset=spatial")


def test_checkpoints_by_steps_are_written_at_the_end_of_an_epoch_too(world: World, folder: Path) -> None:
    recipe = ("model.name=resnet20", "data.source=synthetic", "data.num_samples=20", "train.global_batch=10")
    settings = ("train.epochs=3", "checkpoint.every_steps=2", "checkpoint.keep=9", "log.evaluate_every_epochs=0")
    train(world, folder / "run", *recipe, *settings, "model.sync_batchnorm=false")
    if world.rank == 0:
        names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
        assert names == ["step-00000002.h5", "step-00000004.h5", "step-00000006.h5"]


def test_a_run_for_its_speed_alone_keeps_and_evaluates_nothing(world: World, folder: Path) -> None:
    quiet = ("checkpoint.final=false", "checkpoint.every_epochs=0", "log.evaluate_every_epochs=0")
    outcome = train(world, folder / "run", *LENET, "train.steps=3", *quiet)
    spmd_assert(world.comm, (outcome.step, outcome.score) == (3, None), f"{outcome}")
    spmd_assert(world.comm, not [*(folder / "run").rglob("*.h5")], "something was kept")


def test_the_run_folder_holds_what_the_readme_says(world: World, folder: Path) -> None:
    outcome = train(world, folder / "run", *LENET, "train.steps=3")
    spmd_assert(world.comm, outcome.score is not None, "no score")
    if world.rank == 0:
        names = {path.name for path in (folder / "run").iterdir()}
        assert names >= {"config.toml", "plan.toml", "metrics.jsonl", "final.h5", "checkpoints"}
        assert configuration.load(folder / "run" / "config.toml").train.steps == 3
        record = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
        wanted = "step epoch loss accuracy images_per_second step_s compute_s exposed_comm_s bytes_sent messages_sent"
        assert record.keys() >= set(wanted.split())
        assert checkpoints.load(folder / "run" / "final.h5").step == 3


def test_counted_traffic_is_what_the_schedules_promise(world: World, folder: Path) -> None:
    trainer = make(world, folder / "run", *LENET, "train.steps=2", "exchange.algorithm=ring")
    trainer.train()
    if world.rank == 0 and world.size > 1:
        record = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[1])
        blocks = 2 * (world.size - 1)
        gradient = 4 * trainer.parts.model.spec.num_parameters
        statistics = record["bytes_sent"] - blocks * gradient / world.size
        assert abs(statistics) < 4 * blocks + 32 * 8  # one vector of four totals, uneven blocks


def test_a_loss_that_is_no_number_ends_all_ranks_and_spares_the_checkpoints(world: World, folder: Path) -> None:
    recipe = (*LENET, "train.steps=40", "checkpoint.every_steps=1", "train.lr=1e30", "train.warmup_epochs=0")
    with pytest.raises(NumericsError, match="must be a finite number"):
        train(world, folder / "run", *recipe)
    world.barrier()  # rank 0 comes here when what it was writing is written
    found = checkpoints.latest(folder / "run")
    spmd_assert(world.comm, found is not None and not found.warning, "no intact checkpoint")


def test_bad_requests_are_refused_on_every_rank(world: World, folder: Path) -> None:
    if world.size > 1:
        with pytest.raises(PlanError, match="smaller than the number of ranks"):
            train(world, folder / "small", f"train.global_batch={world.size - 1}")
    train(world, folder / "run", *LENET, "train.steps=1")
    with pytest.raises(ConfigError, match="holds a run already"):
        train(world, folder / "run", *LENET, "train.steps=1")
    with pytest.raises(CheckpointError, match="is of 'lenet5', this run's model is 'resnet20'"):
        make(world, folder / "other", *RESNET, "train.steps=1", init=folder / "run" / "final.h5")
    with pytest.raises(CheckpointError, match="other images"):
        train(world, folder / "run", *LENET, "train.steps=2", "data.source=synthetic", resume=True)
