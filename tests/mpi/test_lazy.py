"""Lazy updates: what one process does that adds gradients up by hand, on any number of ranks."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.comm import World
from hpcnn.errors import PlanError
from hpcnn.geometry import split
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.plan.exchanges import choose_buckets, lazy_rounds
from hpcnn.plan.planner import make_plan
from hpcnn.spec import LinearSpec, ModelSpec
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train import optimizers
from hpcnn.train.setup import assemble
from hpcnn.train.trainer import Trainer
from hpcnn.train.update import StepUpdate
from tests.checks import spmd_assert
from tests.serial import context, loss_and_gradients
from tests.worlds import alone, world

BATCH, STEPS, RATE, MOMENTUM = 7, 8, 0.02, 0.9
SPECS = {
    "lenet5": models.build("lenet5", (16, 16, 1), 10, 0.0),
    "resnet20": models.build("resnet20", (8, 8, 3), 10, 0.0),
}
LAZY = {"lenet5": 1, "resnet20": 4}  # of the convolutions, with the norms between them


def images_of(spec: ModelSpec, step: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng([5, step])
    return draw.standard_normal((BATCH, *spec.input_shape)), draw.integers(0, 10, BATCH)


def lazy_names(name: str) -> list[str]:
    """Return the parameters below the fifth convolution, found without the code under test."""
    names = []
    convolutions = 0
    for layer in SPECS[name].layers:
        convolutions += "conv" in type(layer).__name__.lower()
        if convolutions > LAZY[name] or isinstance(layer, LinearSpec):
            return names
        names += [f"{layer.name}/{short}" for short in layer.parameters]
    raise AssertionError("the model is too small")


@cache
def by_hand(name: str, steps: int, adaptive: bool, ends: tuple[int, ...] = ()) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the parameters after STEPS updates of SGD with momentum, and the length of every round."""
    model = Model(SPECS[name], 3, np.float64)
    parameters = model.parameters
    lazy = lazy_names(name)
    top = lazy[-1].rpartition("/")[0]
    velocity, sums = np.zeros_like(parameters.values), np.zeros_like(parameters.values)
    number, rounds = 0, []
    for step in range(STEPS):
        images, labels = images_of(model.spec, step)
        loss_and_gradients(model, images, labels, context(BATCH, step=step))
        number += 1
        last = number >= steps or step + 1 in ends
        for name, (start, stop) in parameters.offsets.items():
            grad = parameters.grads[start:stop]
            if name in lazy:
                sums[start:stop] += grad
                if not last:
                    continue
                grad = sums[start:stop]
            velocity[start:stop] = MOMENTUM * velocity[start:stop] + grad
            parameters.values[start:stop] -= RATE * velocity[start:stop]
        if last:
            rounds.append(number)
            if adaptive and number == steps:
                where = [place for name, place in parameters.offsets.items() if name.rpartition("/")[0] == top]
                f = np.concatenate([parameters.grads[start:stop] for start, stop in where])
                g = np.concatenate([sums[start:stop] for start, stop in where])
                first = np.sum((f - g) ** 2) + np.sum(f**2) <= np.sum(g**2)
                second = steps * np.sum(f**2) <= np.sum(g**2)
                steps = steps + 1 if first and second else max(1, steps - 1) if not first and not second else steps
            number, sums[:] = 0, 0.0
    return parameters.values, tuple(rounds)


def train(on: World, name: str, *overrides: str, ends: tuple[int, ...] = ()) -> tuple[np.ndarray, list[int], Program]:
    base = ("train.weight_decay=0", f"train.lr={RATE}", f"exchange.lazy_layers={LAZY[name]}")
    spec = SPECS[name]
    config = configuration.load("lenet5", ["exchange.bucket_bytes=50000", *base, *overrides])
    exchange = config.exchange
    model, plan = Model(spec, 3, np.float64), make_plan(spec, config.plan.preset, on.size, BATCH)
    buckets = choose_buckets(
        spec,
        exchange.kind,
        bucket_bytes=exchange.bucket_bytes,
        ranks=on.size,
        global_batch=BATCH,
        nodes=on.engine.nodes,
        every=lazy_rounds(spec, exchange.lazy_layers, exchange.lazy_steps),
        plan=plan,
    )
    program = Program(model, plan, on, make_exchange(exchange, spec, plan, buckets, model.parameters, on))
    optimizer = optimizers.build(config.train, model.parameters)
    part = split(BATCH, on.size, on.rank)
    rounds, number = [], 0
    for step in range(STEPS):
        images, labels = images_of(model.spec, step)
        program.exchange.ends_round = step + 1 in ends
        update = StepUpdate(
            optimizer,
            RATE,
            step,
            clip_norm=0.0,
            whole_tensors=program.exchange.owns_whole_tensors,
            sum_over_ranks=program.sum_over_ranks,
        )
        share = slice(part.start, part.stop)
        where = program.context(training=True, seed=1, step=step, samples=np.arange(BATCH), global_batch=BATCH)
        program.train_step(images[share], labels[share], where, update)
        number += 1
        if program.exchange.complete:
            rounds.append(number)
            number = 0
    program.exchange.settle()
    return model.parameters.values, rounds, program


@pytest.mark.parametrize(
    ("name", "setting", "steps"),
    [
        ("lenet5", "exchange.kind=allreduce", 2),
        ("resnet20", "exchange.kind=sharded", 3),
        ("lenet5", "exchange.kind=factors", 3),
        ("lenet5", "exchange.overlap=false", 3),
    ],
)
def test_lazy_layers_move_by_the_sum_of_a_round(name: str, setting: str, steps: int) -> None:
    found, rounds, _ = train(world(), name, setting, f"exchange.lazy_steps={steps}")
    expected, lengths = by_hand(name, steps, adaptive=False)
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    spmd_assert(world().comm, distance < 1e-7 and tuple(rounds) == lengths, f"{distance:.1e}, {rounds}")


@pytest.mark.parametrize("kind", ["allreduce", "sharded"])
def test_rounds_adapt_to_what_their_gradients_say(kind: str) -> None:
    found, rounds, _ = train(
        world(), "lenet5", f"exchange.kind={kind}", "exchange.lazy_adaptive=true", "exchange.lazy_steps=3"
    )
    expected, lengths = by_hand("lenet5", 3, adaptive=True)
    assert len(set(lengths)) > 1, "the reference never adapts"
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    spmd_assert(world().comm, distance < 1e-7 and tuple(rounds) == lengths, f"{distance:.1e}, {rounds} {lengths}")


def test_rounds_end_early_where_they_are_told_to() -> None:
    found, rounds, _ = train(world(), "lenet5", "exchange.lazy_steps=3", ends=(2, 3, 8))
    expected, lengths = by_hand("lenet5", 3, adaptive=False, ends=(2, 3, 8))
    assert (2, 1, 3, 2) == lengths
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    spmd_assert(world().comm, distance < 1e-7 and tuple(rounds) == lengths)


def test_lazy_layers_send_once_in_a_round() -> None:
    sent = []
    for steps in (1, STEPS):
        lazy = () if steps == 1 else (f"exchange.lazy_steps={steps}",)
        before = world().communication
        train(world(), "lenet5", *lazy, *(() if lazy else ("exchange.lazy_layers=0",)), "exchange.algorithm=ring")
        sent.append((world().communication - before).traffic.num_bytes)
    if world().size > 1:
        offsets = Model(SPECS["lenet5"], 3).parameters.offsets
        elements = sum(stop - start for name, (start, stop) in offsets.items() if name in lazy_names("lenet5"))
        spared = (STEPS - 1) * 8 * elements * 2 * (world().size - 1) / world().size
        assert sent[0] - sent[1] == pytest.approx(spared, rel=0.05)


def run(folder: Path, *overrides: str, on: World | None = None, resume: bool = False) -> Trainer:
    base = (
        "train.global_batch=25",
        "model.dropout=0",
        "train.lr=0.02",
        "train.warmup_epochs=0",
        "exchange.lazy_layers=1",
    )
    config = configuration.load("lenet5", ["checkpoint.every_epochs=0", *base, *overrides])
    trainer = Trainer(
        assemble(config, on or world()), folder, progress_stream=io.StringIO(), result_stream=io.StringIO()
    )
    trainer.prepare(resume=resume)
    trainer.train()
    return trainer


def test_a_checkpoint_ends_a_round_and_a_resumed_run_goes_on_with_its_rounds(folder: Path) -> None:
    recipe = ("exchange.lazy_steps=4", "checkpoint.every_steps=6", "exchange.lazy_adaptive=true", "train.steps=14")
    recipe += ("checkpoint.keep=9",)
    whole = run(folder / "whole", *recipe)
    values = whole.parts.model.parameters.values.copy()
    run(folder / "parts", *recipe)
    if world().rank == 0:
        kept = sorted((folder / "parts" / "checkpoints").iterdir())
        assert 6 in [checkpoints.load(path).step for path in kept]
        for path in kept:
            if checkpoints.load(path).step != 6:
                path.unlink()
        (folder / "parts" / "final.h5").unlink()
    world().barrier()
    again = run(folder / "parts", *recipe, resume=True)
    distance = np.linalg.norm(again.parts.model.parameters.values - values) / np.linalg.norm(values)
    spmd_assert(world().comm, distance < 1e-6, f"{distance:.1e}")
    if world().rank == 0:
        records = [json.loads(line) for line in (folder / "parts" / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, 15))


def test_layers_with_cut_weights_are_refused() -> None:
    if world().size > 1:
        with pytest.raises(PlanError, match=r"are cut, and lazy updates are for layers that all ranks have"):
            train(world(), "resnet20", "plan.preset=model")
    with pytest.raises(PlanError, match=r"exchange.lazy_layers is 99 and resnet20 has \d+ convolutions"):
        lazy_rounds(SPECS["resnet20"], 99, 2)
    assert alone().size == 1
