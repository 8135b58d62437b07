"""Groups of ranks that train replicas, and the rules that average them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.comm import World
from hpcnn.comm.collectives import allreduce
from hpcnn.errors import ConfigError, NumericsError, PlanError
from hpcnn.geometry import Block
from hpcnn.ops import backend
from hpcnn.plan.schedules import num_stages
from hpcnn.train.feed import make_loader
from hpcnn.train.metrics import Record
from hpcnn.train.setup import assemble
from hpcnn.train.trainer import Trainer
from hpcnn.train.update import StepUpdate
from tests.checks import spmd_assert
from tests.device import FakeCopies, fake_gpu
from tests.worlds import alone, world

LENET = (
    *("data.source=synthetic", "data.image_shape=[16,16,1]", "data.num_samples=180", "train.global_batch=60"),
    *("data.crop_padding=1", "model.dropout=0.3", "train.lr=0.02", "train.warmup_epochs=0", "train.steps=4"),
)
RESNET = (*LENET, "model.name=resnet20", "data.image_shape=[8,8,3]")
PLAIN_SGD = ("train.momentum=0", "train.weight_decay=0")
SIZES = world().size


def make(folder: Path, *overrides: str, on: World | None = None, resume: bool = False) -> Trainer:
    config = configuration.load("lenet5", ["checkpoint.every_epochs=0", *overrides])
    parts = assemble(config, on or world())
    trainer = Trainer(parts, folder, progress_stream=io.StringIO(), result_stream=io.StringIO())
    trainer.prepare(resume=resume)
    return trainer


def train(folder: Path, *overrides: str, on: World | None = None, resume: bool = False) -> np.ndarray:
    """Return the parameters after a run."""
    trainer = make(folder, *overrides, on=on, resume=resume)
    trainer.train()
    return trainer.parts.model.parameters.values


def records(folder: Path, event: str) -> list[Record]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def assert_equal_everywhere(values: np.ndarray) -> None:
    root = values.copy()
    world().broadcast(root)
    spmd_assert(world().comm, np.array_equal(root, values), "parameters are not those of rank 0")


def test_one_group_trains_as_without_groups_bit_by_bit(folder: Path) -> None:
    expected = train(folder / "plain", *LENET, "train.steps=3")
    actual = train(folder / "averaged", *LENET, "train.steps=3", "average.rule=mixing", "average.groups=1")
    spmd_assert(world().comm, np.array_equal(actual, expected), "one group is not training as it is")


def test_averages_after_every_step_of_plain_sgd_are_training_with_summed_gradients(folder: Path) -> None:
    once = (*LENET, *PLAIN_SGD, "average.rule=equal", "average.every_steps=1")
    actual = train(folder / "averaged", *once)
    expected = train(folder / "plain", *LENET, *PLAIN_SGD)
    worst = distance(actual, expected)
    spmd_assert(world().comm, worst < 1e-6, f"parameters differ by {worst:.1e}")
    same = True
    if world().rank == 0:
        curves = [[one["loss"] for one in records(folder / run, "step")] for run in ("averaged", "plain")]
        same = np.allclose(*curves, rtol=1e-5, atol=0)
    spmd_assert(world().comm, same, "the losses on record are not those of the whole batch")
    if SIZES > 1:
        rarely = train(folder / "rarely", *once, "average.every_steps=3")
        spmd_assert(world().comm, distance(rarely, expected) > 1e-5, "three steps apart make no difference")


@pytest.mark.skipif(SIZES != 4, reason="two groups of two ranks")
@pytest.mark.parametrize("plan", ["data", "hybrid"])
def test_groups_of_two_ranks_train_what_one_rank_trains_on_their_images(folder: Path, plan: str) -> None:
    recipe = (*LENET, *PLAIN_SGD, "average.rule=equal", "average.every_steps=1", "average.groups=2")
    actual = make(folder / "groups", *recipe, f"plan.preset={plan}", "exchange.kind=sharded")
    actual.train()
    one = train(folder / f"alone-{world().rank}", *LENET, *PLAIN_SGD, on=alone())
    model = actual.parts.model
    whole = alone_tensors(one, folder, *LENET)
    for layer, part in zip(model.spec.layers, model.parts, strict=True):
        for short in layer.parameters:
            expected = whole[f"{layer.name}/{short}"][tuple(slice(*block) for block in part.tensors[short])]
            worst = distance(model.parameters[f"{layer.name}/{short}"].value, expected)
            spmd_assert(world().comm, worst < 1e-5, f"{layer.name}/{short} differs by {worst:.1e}")


def alone_tensors(values: np.ndarray, folder: Path, *recipe: str) -> dict[str, np.ndarray]:
    parameters = make(folder / f"names-{world().rank}", *recipe, on=alone()).parts.model.parameters
    return {one.name: parameters.view(values, one.name) for one in parameters.parameters}


@pytest.mark.parametrize(
    "settings",
    [
        ("average.rule=softmax", "average.validation_samples=60", "average.smoothing=0.5"),
        ("average.rule=equal", "average.reparameterised=true", "average.momentum=reset", "average.every_steps=3"),
        ("average.rule=mixing",),
    ],
    ids=["softmax", "reparameterised", "mixing"],
)
def test_replicas_end_in_equal_bits_and_what_they_did_is_recorded(folder: Path, settings: tuple[str, ...]) -> None:
    trainer = make(folder / "run", *RESNET, *settings)
    outcome = trainer.train()
    assert_equal_everywhere(trainer.parts.model.parameters.values)
    assert_equal_everywhere(np.concatenate([one.ravel() for one in trainer.parts.model.statistics.values()]))
    assert outcome.score is not None
    assert outcome.score.num_samples == 22
    good = True
    if world().rank == 0 and SIZES > 1:
        averages = records(folder / "run", "average")
        good = bool(averages) and averages[-1]["lasting"] and averages[-1]["step"] == trainer.parts.total_steps
        for one in averages:
            good = good and len(one["weights"]) == SIZES and sum(one["weights"]) == 1
        mixed_by_two = SIZES == 2 and "average.rule=mixing" in settings
        good = good and (0 < averages[0]["consensus"] < 1 or mixed_by_two)
    spmd_assert(world().comm, good, "the records of averages are wrong")


def test_replicas_count_by_the_images_of_their_shards_which_no_other_group_sees(folder: Path) -> None:
    sizes = [10 + rank for rank in range(SIZES)]
    parts = [size / sum(sizes) for size in sizes]
    recipe = ("average.rule=size", f"average.shards={parts}", "average.floor=0", "average.validation_samples=30")
    trainer = make(folder / "run", *LENET, *recipe)
    with make_loader(trainer.parts, trainer.step) as loader:
        seen = set(np.concatenate([batch.samples for batch in loader]).tolist())
    trainer.train()
    everyone = world().comm.allgather(seen)
    disjoint = sum(map(len, everyone)) == len(set.union(*everyone))
    spmd_assert(world().comm, disjoint, "groups share images")
    good = True
    if world().rank == 0 and SIZES > 1:
        weights = records(folder / "run", "average")[-1]["weights"]
        good = np.allclose(weights, parts, rtol=0, atol=1 / 150) and sorted(weights) == weights != weights[::-1]
    spmd_assert(world().comm, good, "weights are not those of the shards")


@pytest.mark.parametrize(("model", "rule"), [(LENET, "equal"), (RESNET, "mixing")], ids=["equal", "mixing"])
def test_evaluations_and_checkpoints_leave_the_replicas_alone(folder: Path, model: tuple[str, ...], rule: str) -> None:
    recipe = (*model, f"average.rule={rule}", "average.every_epochs=5", "average.momentum=reset")
    seldom = train(folder / "seldom", *recipe, "log.evaluate_every_epochs=0")
    often = train(folder / "often", *recipe, "checkpoint.every_steps=2")
    spmd_assert(world().comm, np.array_equal(seldom, often), "they change the training")


def test_a_run_goes_on_from_the_end_of_a_round_as_if_never_stopped(folder: Path) -> None:
    recipe = (*LENET, "average.rule=softmax", "average.validation_samples=60", "average.smoothing=0.5")
    recipe = (*recipe, "checkpoint.every_steps=2", "average.every_steps=2")
    expected = train(folder / "run", *recipe)
    if world().rank == 0:
        newest = sorted((folder / "run" / "checkpoints").iterdir())
        for path in (newest[-1], folder / "run" / "final.h5", folder / "run" / "best.h5"):
            path.unlink(missing_ok=True)
    world().barrier()
    trainer = make(folder / "run", *recipe, resume=True)
    spmd_assert(world().comm, 0 < trainer.step < trainer.parts.total_steps, "it begins anew")
    trainer.train()
    actual = trainer.parts.model.parameters.values
    spmd_assert(world().comm, np.array_equal(actual, expected), f"parameters differ by {distance(actual, expected)}")


def test_a_step_of_mixing_sends_the_parameters_once_and_silent_steps_lead_to_the_mean(folder: Path) -> None:
    trainer = make(folder / "run", *LENET, "average.rule=mixing")
    groups, values = trainer.parts.groups, trainer.parts.model.parameters.values
    if groups.across is None:
        assert SIZES == 1
        return
    across, stages = groups.across, num_stages(SIZES)
    values[...] = np.random.default_rng(world().rank).standard_normal(values.size)
    mean = values.astype(np.float64)
    allreduce(across.comm, mean, "mpi")
    mean /= SIZES
    before = across.engine.traffic
    for step in range(1, stages + 1):
        trainer.rule.after_step(step)
    sent = across.engine.traffic - before
    spmd_assert(world().comm, (sent.num_messages, sent.num_bytes) == (stages, stages * values.nbytes), f"sent {sent}")
    if SIZES & (SIZES - 1) == 0:
        spmd_assert(world().comm, np.abs(values - mean).max() < 1e-6, "a round does not give the mean")
        assert_equal_everywhere(values)
        before = across.engine.traffic
        allreduce(across.comm, values.copy(), "butterfly")
        whole = (across.engine.traffic - before).num_bytes
        spmd_assert(world().comm, sent.num_bytes // stages == whole // stages, f"a butterfly sends {whole} bytes")
    for step in range(stages + 1, 40 * stages):
        trainer.rule.after_step(step)
    spmd_assert(world().comm, distance(values, mean) < 1e-5, "rounds do not lead to the mean")


@pytest.mark.parametrize("clip", ["train.clip_norm=0", "train.clip_norm=1"])
def test_a_replica_that_is_no_number_ends_the_run_on_all_ranks(folder: Path, clip: str) -> None:
    trainer = make(folder / "run", *LENET, "average.rule=equal", clip)
    if world().rank == SIZES - 1:
        trainer.parts.model.parameters.values[:] = np.nan
    with pytest.raises(NumericsError):
        trainer.train()


def test_a_gradient_that_is_no_number_in_one_group_ends_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss that says nothing of it, so that only the group itself finds out."""
    look = StepUpdate.look

    def look_at_damage(update: StepUpdate, counted: Sequence[Block]) -> None:
        if world().rank == SIZES - 1:
            trainer.parts.model.parameters.grads[:] = np.inf
        look(update, counted)

    monkeypatch.setattr(StepUpdate, "look", look_at_damage)
    trainer = make(folder / "run", *LENET, "average.rule=equal", "train.clip_norm=1", "exchange.timeout_seconds=20")
    with pytest.raises(NumericsError):
        trainer.train()
    spmd_assert(world().comm, trainer.step == 0, f"{trainer.step} steps were made")


@pytest.mark.parametrize(
    "settings",
    [
        (*RESNET, "average.rule=equal", "average.reparameterised=true", "average.every_steps=1"),
        (*LENET, "average.rule=mixing"),
    ],
    ids=["reparameterised", "mixing"],
)
def test_replicas_on_devices_are_averaged_as_on_hosts(
    folder: Path, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (*settings, "train.steps=2")
    with backend.use("numpy"):
        expected = train(folder / "host", *recipe)
    monkeypatch.setattr("hpcnn.train.setup.open_device", lambda config, world: None)
    monkeypatch.setattr("hpcnn.parallel.program.CopyStream", lambda: FakeCopies(1))
    monkeypatch.setattr("hpcnn.comm.engine.CopyStream", lambda: FakeCopies(2))
    monkeypatch.setattr("hpcnn.gpu.Ranges", lambda: None)
    monkeypatch.setattr("hpcnn.gpu.peak_memory_bytes", lambda: 0)
    monkeypatch.setattr("hpcnn.gpu.out_of_memory", nullcontext)
    try:
        with fake_gpu():
            actual = train(folder / "device", *recipe, "device=cuda")
    finally:
        world().engine.copies = None
    spmd_assert(world().comm, np.array_equal(actual.get(), expected), f"{distance(actual.get(), expected)} apart")


def test_groups_that_do_not_divide_are_refused() -> None:
    for settings, error, words in (
        ([f"average.groups={SIZES + 1}"], ConfigError, "must divide the number of ranks"),
        ([f"train.global_batch={7 * SIZES + 1}"], ConfigError, "must be a multiple of the number of groups"),
        (["average.shards=[0.5,0.25,0.125,0.0625,0.03125,0.03125]"], ConfigError, "one fraction for each"),
    ):
        if SIZES == 1 and "multiple" in words:
            continue
        config = configuration.load("lenet5", [*LENET, "average.rule=equal", *settings])
        with pytest.raises(error, match=words):
            assemble(config, world())


@pytest.mark.skipif(SIZES != 4, reason="two groups of two ranks")
def test_directions_of_cut_filters_are_refused(folder: Path) -> None:
    recipe = (*LENET, "average.rule=equal", "average.groups=2", "average.reparameterised=true", "plan.preset=hybrid")
    with pytest.raises(PlanError, match="needs whole filters"):
        make(folder / "run", *recipe)
