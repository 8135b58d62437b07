"""The information plane is the same on any number of ranks and under any plan, and leaves no trace in the training."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.analysis.information_plane import InformationPlane
from hpcnn.analysis.plane_file import FILE, Plane, read
from hpcnn.comm import World
from hpcnn.errors import HpcnnError, PlanError
from hpcnn.train.checkpoint import latest
from hpcnn.train.setup import assemble
from hpcnn.train.trainer import Trainer
from tests.checks import spmd_assert
from tests.worlds import alone, world

BASE = (
    *("train.global_batch=10", "train.compute=fp64", "train.lr=0.02", "train.steps=4", "checkpoint.every_epochs=0"),
    *("data.source=synthetic", "data.num_samples=160", "data.image_shape=[20,20,3]"),
)
PLANE = (
    *("analysis.information_plane_every_steps=2", "analysis.samples=13", "analysis.maps_every=2"),
    *("analysis.errors=true", "analysis.maps=4", "analysis.pairs=3"),
)
RESNET = (
    *(
        "model.name=resnet20",
        "data.image_shape=[8,8,3]",
        "analysis.samples=8",
        "analysis.maps_every=0",
        "analysis.errors=true",
    ),
    *("train.steps=1", "analysis.information_plane_every_steps=1"),
)


def train(ranks: World, folder: Path, *overrides: str, resume: bool = False) -> Trainer:
    parts = assemble(configuration.load("lenet5", [*BASE, *overrides]), ranks)
    on = parts.config.analysis.information_plane_every_steps
    trainer = Trainer(
        parts,
        folder,
        progress_stream=io.StringIO(),
        result_stream=io.StringIO(),
        observers=[InformationPlane(parts)] if on else (),
    )
    trainer.prepare(resume=resume)
    trainer.train()
    return trainer


def plane(folder: Path) -> Plane:
    found = read(folder / FILE)
    assert found is not None
    return found


def difference(one: Plane, other: Plane) -> float:
    """Return the largest relative difference of any number but times and truths, and of what is near zero."""
    assert one.columns.keys() == other.columns.keys()
    worst = 0.0
    for name, actual in one.columns.items():
        expected = other.columns[name]
        assert actual.shape == expected.shape, name
        if name != "seconds" and expected.dtype != bool:
            worst = max(worst, float(np.max(np.abs(actual - expected) / np.maximum(1, np.abs(expected)), initial=0)))
    return worst


@pytest.mark.parametrize(
    "recipe",
    [
        (),
        ("plan.preset=spatial",),
        ("plan.preset=model",),
        ("plan.preset=hybrid", "analysis.kernel=tensor", "analysis.width=alignment", "analysis.maps_every=0"),
        RESNET,
    ],
    ids=["data", "spatial", "model", "hybrid", "resnet20"],
)
def test_the_plane_is_that_of_one_rank(folder: Path, recipe: tuple[str, ...]) -> None:
    train(world(), folder / "together", *PLANE, *recipe)
    worst = 0.0
    if world().rank == 0:
        train(alone(), folder / "alone", *PLANE, *recipe)
        together, expected = plane(folder / "together"), plane(folder / "alone")
        assert together.layers == expected.layers
        assert len(together.columns["step"]) == (2 if recipe is RESNET else 3)
        worst = difference(together, expected)
    spmd_assert(world().comm, worst < 1e-9, f"quantities differ by {worst:.1e}")


@pytest.mark.parametrize(
    "recipe",
    [("model.dropout=0.3", "exchange.kind=sharded"), RESNET, ("exchange.lazy_layers=1", "exchange.lazy_steps=3")],
    ids=["lenet5", "resnet20", "lazy"],
)
def test_training_does_not_notice(folder: Path, recipe: tuple[str, ...]) -> None:
    recipe = (*PLANE, *recipe, "train.compute=fp32", "train.steps=3")
    watched = train(world(), folder / "watched", *recipe, "analysis.information_plane_every_steps=1")
    plain = train(world(), folder / "plain", *recipe, "analysis.information_plane_every_steps=0")
    for one, other in (
        (watched.parts.model.parameters.values, plain.parts.model.parameters.values),
        *zip(watched.parts.model.statistics.values(), plain.parts.model.statistics.values(), strict=True),
        *zip(watched.optimizer.state.values(), plain.optimizer.state.values(), strict=True),
    ):
        spmd_assert(world().comm, np.array_equal(one, other), "training with the analysis has other bits")


def test_a_resumed_run_has_each_step_once(folder: Path) -> None:
    smooth = ("analysis.kernel=tensor", "analysis.width=alignment", "analysis.maps_every=0")
    train(world(), folder / "run", *PLANE, *smooth, "checkpoint.every_steps=3", "train.schedule=constant")
    if world().rank == 0:
        shutil.copy(folder / "run" / FILE, folder / FILE)
        (folder / "run" / "final.h5").unlink()
        for path in (folder / "run" / "checkpoints").glob("*4.h5"):
            path.unlink()
        assert latest(folder / "run").checkpoint.step == 3
    world().barrier()
    train(world(), folder / "run", *PLANE, *smooth, "train.schedule=constant", resume=True)
    worst = 0.0
    if world().rank == 0:
        again = plane(folder / "run")
        assert again.columns["step"].tolist() == [0, 2, 4]
        worst = difference(again, plane(folder))
    spmd_assert(world().comm, worst < 1e-9, f"quantities differ by {worst:.1e}")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (("analysis.layers=['conv1','nose']",), "nose"),
        (("analysis.samples=100000",), "analysis.samples"),
        (("plan.preset=spatial", "plan.turns=[2,2]"), "plan.turns"),
    ],
    ids=["layer", "samples", "turns"],
)
def test_what_cannot_be_measured_is_refused_by_all_ranks(folder: Path, recipe: tuple[str, ...], words: str) -> None:
    with pytest.raises(HpcnnError, match=words):
        train(world(), folder / "run", *PLANE, *recipe)


def test_errors_that_stay_in_parts_are_refused(folder: Path) -> None:
    recipe = (*PLANE, "model.name=yolo16", "model.batchnorm=false", "data.source=synthetic", "data.num_samples=16")
    recipe += ("data.image_shape=[64,64,3]", "train.global_batch=2", "train.steps=1", "analysis.samples=2")
    recipe += ("plan.preset=tiled-groups", "analysis.errors=true", "analysis.maps_every=0", "train.compute=fp32")
    if world().size == 1:
        return
    with pytest.raises(PlanError, match=r"analysis\.errors"):
        train(world(), folder / "run", *recipe)
    train(world(), folder / "other", *recipe, "analysis.errors=false")
