"""Separation of subspaces gives on several ranks what it gives on one, and so do networks of single classes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest

from hpcnn import configuration
from hpcnn.comm import World
from hpcnn.data.sources import open_data
from hpcnn.errors import CheckpointError, ConfigError, PlanError
from hpcnn.nn.separation import BASIS, MATRICES
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train.class_networks import ClassNetworks, ClassScore
from hpcnn.train.separation import measure_separation
from hpcnn.train.setup import assemble
from hpcnn.train.trainer import Trainer
from tests.checks import relative_error, spmd_assert
from tests.worlds import alone, world

RECIPE = (
    *("data.source=synthetic", "data.image_shape=[12,12,1]", "data.num_classes=3", "data.num_samples=80"),
    *("data.flip=false", "train.global_batch=11", "train.compute=fp64", "train.warmup_epochs=0"),
    *("train.schedule=constant", "checkpoint.every_epochs=0", "separation.dimension=3"),
)


def make(on: World, folder: Path, *overrides: str, resume: bool = False) -> Trainer:
    config = configuration.load("lenet5", [*RECIPE, *overrides])
    trainer = Trainer(assemble(config, on), folder, progress_stream=io.StringIO(), result_stream=io.StringIO())
    trainer.prepare(resume=resume)
    return trainer


def apart(one: Trainer, other: Trainer) -> float:
    """Return the largest relative error of parameters and class matrices."""
    models = one.parts.model, other.parts.model
    parameters = relative_error(*(model.parameters.values for model in models))
    return max(parameters, relative_error(*(model.statistics[MATRICES] for model in models)))


@pytest.mark.parametrize(
    ("method", "refresh", "plan"),
    [("geodesic", 2, ("exchange.kind=sharded",)), ("chordal", 1, ("plan.preset=spatial", "exchange.wait=step"))],
)
def test_ranks_together_train_what_one_rank_trains(
    folder: Path, method: str, refresh: int, plan: tuple[str, ...]
) -> None:
    recipe = (f"separation.method={method}", "separation.weight=20", f"separation.refresh={refresh}", "train.steps=5")
    together = make(world(), folder / "together", *recipe, *plan)
    together.train()
    reference = make(alone(), folder / f"alone-{world().rank}", *recipe)
    reference.train()
    error = apart(together, reference)
    spmd_assert(world().comm, error < 1e-10, f"parameters or matrices differ by {error:.1e}")
    records = [json.loads(line) for line in (folder / "together" / "metrics.jsonl").read_text().splitlines()]
    terms = [record["separation"] for record in records if record["event"] == "step"]
    assert [term > 0 for term in terms] == [step % refresh == 0 for step in range(5)]
    assert together.parts.test_data is not None
    score, expected = (measure_separation(one.parts, one.parts.test_data) for one in (together, reference))
    spmd_assert(world().comm, abs(score.geodesic - expected.geodesic) < 1e-9, f"{score} instead of {expected}")
    spmd_assert(world().comm, score.rejection_accuracy == expected.rejection_accuracy, f"{score}")


def test_the_term_changes_what_is_trained(folder: Path) -> None:
    runs = []
    for weight in ("0", "20"):
        recipe = ("separation.method=geodesic", f"separation.weight={weight}", "train.steps=2")
        runs.append(make(world(), folder / weight, *recipe))
        runs[-1].train()
    spmd_assert(world().comm, apart(*runs) > 1e-6, "the term has no effect")


def test_a_resumed_run_goes_on_with_its_class_matrices(folder: Path) -> None:
    recipe = ("separation.method=chordal", "separation.weight=20", "train.lr=0.02")
    straight = make(world(), folder / "straight", *recipe, "train.steps=4")
    straight.train()
    make(world(), folder / "parts", *recipe, "train.steps=2").train()
    resumed = make(world(), folder / "parts", *recipe, "train.steps=4", resume=True)
    resumed.train()
    error = apart(straight, resumed)
    spmd_assert(world().comm, error < 1e-12, f"parameters or matrices differ by {error:.1e}")


def test_plans_that_cut_features_are_refused() -> None:
    if world().size == 1:
        return
    for preset in ("hybrid", "model"):
        config = configuration.load("lenet5", [*RECIPE, "separation.method=chordal", f"plan.preset={preset}"])
        with pytest.raises(PlanError, match="needs all outputs of layer 'fc2'"):
            assemble(config, world())


def class_networks(on: World, folder: Path, *overrides: str) -> ClassNetworks:
    recipe = (*RECIPE, "separation.method=rejection", "separation.held_out=0.3", "train.lr=0.02")
    return ClassNetworks(configuration.load("lenet5", [*recipe, *overrides]), on, folder)


def trained(on: World, folder: Path, *overrides: str, resume: bool = False) -> ClassScore:
    networks = class_networks(on, folder, *overrides)
    assert not networks.train(resume=resume, progress_stream=io.StringIO(), result_stream=io.StringIO())
    return networks.test(open_data(networks.config.data, "test"))


def test_networks_of_classes_depend_neither_on_the_groups_nor_on_a_stop(folder: Path) -> None:
    """All ranks train every network together, or as many groups as there can be share them out, after the first."""
    refresh = "separation.refresh=3"
    expected = dataclasses.asdict(trained(alone(), folder / f"alone-{world().rank}", refresh, "train.steps=4"))
    trained(world(), folder / "stopped", refresh, "train.steps=2", "separation.groups=1")
    for run, groups, resume in (("stopped", 0, True), ("together", 1, False)):
        score = trained(world(), folder / run, refresh, "train.steps=4", f"separation.groups={groups}", resume=resume)
        for name, value in dataclasses.asdict(score).items():
            error = relative_error(expected[name], value)
            spmd_assert(world().comm, error < 1e-7, f"{run}: {name} differs by {error:.1e}")
        for index in range(3):
            one, other = (
                checkpoints.load(folder / name / f"class-{index:03d}" / "final.h5")
                for name in (f"alone-{world().rank}", run)
            )
            error = relative_error(one.parameters["fc1/weight"], other.parameters["fc1/weight"])
            spmd_assert(world().comm, error < 1e-9, f"{run}: weights differ by {error:.1e}")
            assert other.statistics[BASIS].shape == (84, 3)


def test_a_run_of_classes_is_not_overwritten_and_a_missing_network_is_named(folder: Path) -> None:
    trained(world(), folder, "train.steps=1")
    networks = class_networks(world(), folder, "train.steps=1")
    with pytest.raises(ConfigError, match="holds a run already"):
        networks.train(resume=False, progress_stream=io.StringIO(), result_stream=io.StringIO())
    world().barrier()
    if world().rank == 0:
        (folder / "class-001" / "final.h5").unlink()
    world().barrier()
    with pytest.raises(CheckpointError, match=r"class-001/final.h5' is missing"):
        networks.test(open_data(networks.config.data, "test"))
    with pytest.raises(ConfigError, match=r"'separation.groups' \(=9\) must be at most"):
        class_networks(world(), folder, "separation.groups=9")
