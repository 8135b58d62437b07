"""Every plan, whatever it cuts, trains the same network as one process that has the whole batch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from functools import cache
from math import prod
from typing import NamedTuple

import numpy as np
import pytest

from hpcnn import config as configuration
from hpcnn.comm import World
from hpcnn.errors import PlanError
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.nn.models.yolo import yolo16
from hpcnn.parallel.exchange import Exchange, make_exchange
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.parallel.program import Program
from hpcnn.parallel.whole import Whole
from hpcnn.plan import placement
from hpcnn.plan.buckets import make_buckets
from hpcnn.plan.exchanges import choose_buckets
from hpcnn.plan.layout import Layout
from hpcnn.plan.planner import AXES, PRESETS, Plan, checked, make_plan
from hpcnn.spec import ModelSpec
from hpcnn.timeline import Timeline
from hpcnn.train import optimizers
from hpcnn.train.update import StepUpdate
from tests.checks import spmd_assert
from tests.worlds import alone, world

BATCH = 7
SHAPES = {"lenet5": (28, 28, 1), "resnet20": (16, 16, 3), "vgg11-32": (32, 32, 3), "yolo16": (48, 32, 3)}
SMALL = ("lenet5", "resnet20", "yolo16")  # VGG takes its time in double precision


class Result(NamedTuple):
    losses: np.ndarray
    tensors: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


@cache
def spec_of(name: str) -> ModelSpec:
    if name == "branching":
        return branching()
    if name == "plain-yolo16":
        return yolo16(SHAPES["yolo16"], 10, batchnorm=False)
    return models.build(name, SHAPES[name], 10, 0.25)


def train(on: World, spec: ModelSpec, plan: Plan, *overrides: str, steps: int = 3, dtype: type = np.float64) -> Result:
    """Return the losses of some steps on random images, and on rank 0 the global parameters and momentum."""
    config = configuration.load("lenet5", ["exchange.bucket_bytes=50000", "train.weight_decay=1e-3", *overrides])
    settings = config.exchange
    model = Model(spec, 3, dtype, plan.parts(spec, on.rank))
    buckets = choose_buckets(
        spec,
        settings.kind,
        bucket_bytes=settings.bucket_bytes,
        ranks=on.size,
        global_batch=plan.global_batch,
        nodes=on.engine.nodes,
        plan=plan,
        rank=on.rank,
    )
    exchange = make_exchange(settings, spec, plan, buckets, model.parameters, on)
    program = Program(model, plan, on, exchange, algorithm=settings.algorithm)
    optimizer = optimizers.build(config.train, model.parameters)
    route = program.route(plan.global_batch)
    draw = np.random.default_rng(5)
    losses = []
    for step in range(steps):
        images = draw.standard_normal((plan.global_batch, *spec.input_shape)).astype(dtype)
        labels = draw.integers(0, 10, plan.global_batch)
        own = images[tuple(slice(*block) for block in route.images)]
        context = program.context(
            training=True, seed=1, step=step, samples=np.arange(plan.global_batch), global_batch=plan.global_batch
        )
        update = StepUpdate(
            optimizer,
            0.02,
            step,
            clip_norm=config.train.clip_norm,
            whole_tensors=exchange.owns_whole_tensors,
            sum_over_ranks=program.sum_over_ranks,
        )
        losses.append(program.train_step(own, labels[slice(*route.labels)], context, update)[0])
    exchange.settle()
    for slot in optimizer.state.values():
        exchange.collect(slot)
    whole = Whole(model, plan, on)
    tensors = {name: np.array(tensor) for name, tensor in whole.tensors(model.parameters.values).items()}
    state = {name: np.array(tensor) for name, tensor in whole.tensors(optimizer.state["velocity"]).items()}
    return Result(np.array(on.comm.allgather(losses)).sum(axis=0), tensors, state)


@cache
def serial(name: str, batch: int = BATCH, *overrides: str, steps: int = 3) -> Result:
    spec = spec_of(name)
    return train(alone(), spec, make_plan(spec, "data", 1, batch), *overrides, steps=steps)


def assert_equal_training(found: Result, expected: Result, tolerance: float = 1e-9) -> None:
    spmd_assert(world().comm, np.allclose(found.losses, expected.losses, rtol=tolerance))
    if world().rank == 0:
        for ours, theirs in ((found.tensors, expected.tensors), (found.state, expected.state)):
            for name, tensor in theirs.items():
                assert np.linalg.norm(ours[name] - tensor) <= tolerance * np.linalg.norm(tensor), name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_preset_trains_as_one_process_does(name, preset):
    spec, steps, batch = spec_of(name), 3 if name in SMALL else 1, BATCH if name in SMALL else 5
    found = train(world(), spec, make_plan(spec, preset, world().size, batch), steps=steps)
    assert_equal_training(found, serial(name, batch, steps=steps))


@pytest.mark.parametrize("preset", ["spatial", "model", "tiled-groups"])
def test_fewer_samples_than_ranks_are_enough_where_images_or_filters_are_cut(preset):
    spec = spec_of("yolo16")
    plan = make_plan(spec, preset, world().size, 1)
    assert_equal_training(train(world(), spec, plan), serial("yolo16", 1))


@pytest.mark.parametrize(("preset", "name", "layer"), [("spatial", "yolo16", "conv2"), ("hybrid", "lenet5", "fc1")])
def test_what_needs_nothing_of_others_is_computed_while_the_rest_travels(preset, name, layer):
    on, spec = world(), spec_of(name)
    plan = make_plan(spec, preset, on.size, BATCH)
    model = Model(spec, 3, np.float64, plan.parts(spec, on.rank))
    images = np.random.default_rng(5).standard_normal((BATCH, *spec.input_shape))
    logits, spans = [], []
    for overlap in (True, False):
        exchange = Exchange([Carrier(bucket) for bucket in make_buckets(spec.layers, 1)], on.engine, overlap=overlap)
        program = Program(model, plan, on, exchange)
        program.timeline = Timeline()
        context = program.context(training=False, seed=1, step=0, samples=np.arange(BATCH), global_batch=BATCH)
        own = images[tuple(slice(*block) for block in program.route(BATCH).images)]
        logits.append(program.predict(own, context))
        spans.append([span.name for span in program.timeline.spans])
    spmd_assert(on.comm, np.allclose(*logits, rtol=1e-12, atol=1e-12))
    parts = [f"{layer} forward, inside", f"{layer} forward, border"]
    in_pieces = on.comm.allgather(parts == [span for span in spans[0] if span in parts])
    assert any(in_pieces) == (on.size > 1 if preset == "spatial" else on.size == 2), "of 7 samples a third is too few"
    spmd_assert(on.comm, not any("," in span for span in spans[1]), "pieces though nothing travels meanwhile")


@pytest.mark.parametrize("kind", ["sharded", "factors", "auto"])
def test_exchanges_serve_ranks_without_samples(kind):
    spec = spec_of("lenet5")
    plan = make_plan(spec, "spatial", world().size, 2)
    assert_equal_training(train(world(), spec, plan, f"exchange.kind={kind}"), serial("lenet5", 2))


@pytest.mark.parametrize("setting", ["kind=sharded", "kind=factors", "kind=auto", "algorithm=ring", "overlap=false"])
@pytest.mark.parametrize("preset", ["hybrid", "model", "spatial"])
def test_every_exchange_serves_cut_layers_too(preset, setting):
    spec = spec_of("lenet5")
    plan = make_plan(spec, preset, world().size, BATCH)
    assert_equal_training(train(world(), spec, plan, f"exchange.{setting}"), serial("lenet5"))


def test_the_norm_of_the_gradient_counts_every_part_once():
    spec = spec_of("lenet5")
    plan = make_plan(spec, "hybrid", world().size, BATCH)
    clipped = "train.clip_norm=0.3"
    assert_equal_training(train(world(), spec, plan, clipped), serial("lenet5", BATCH, clipped))


def legal_mix(spec: ModelSpec, seed: int, ranks: int) -> Plan:
    """Return a plan with a random grid for every layer, and random layers fused, as far as they are not refused.

    Of those that are fused half settle.
    """
    draw = np.random.default_rng([seed, ranks])
    layouts = {}
    for layer in spec.layers:
        parts = itertools.product(range(1, ranks + 1), repeat=5)
        grids = [grid for grid in parts if prod(grid) == ranks or (prod(grid) < ranks and draw.random() < 0.05)]
        for index in draw.permutation(len(grids)):
            layout = Layout(**dict(zip(AXES, grids[index], strict=True)))
            with contextlib.suppress(PlanError):
                placement.check(layer, layout, ranks)
                layouts[layer.name] = layout
                break
    plan = Plan(model=spec.name, ranks=ranks, global_batch=BATCH, layouts=tuple(layouts.items()))
    for layer in spec.layers:
        if draw.random() < 0.4:
            with contextlib.suppress(PlanError):
                plan = checked(dataclasses.replace(plan, fused=plan.fused | {layer.name}), spec)
    return settling(plan, spec, draw, 0.5)


def settling(plan: Plan, spec: ModelSpec, draw: np.random.Generator, share: float) -> Plan:
    """Return the plan with random ones of its fused layers settled."""
    return checked(
        dataclasses.replace(plan, settled=frozenset(n for n in sorted(plan.fused) if draw.random() < share)), spec
    )


def branching() -> ModelSpec:
    """Return a model whose values have readers of several kinds and reaches, with all layers that serve tiles."""
    graph = GraphBuilder("branching", (24, 20, 3))
    graph.conv("conv1", 4, 5, padding=2, activation="relu")
    first = graph.conv("conv2", 6, 3, padding=1)
    graph.max_pool("pool1", 3, stride=1, padding=1)
    graph.conv("conv3", 6, (3, 1), padding=((1, 1), (0, 0)), activation="leaky_relu")
    second = graph.add("add1", first, activation="relu")
    graph.conv("conv4", 8, 3, stride=2, padding=1, bias=False)
    third = graph.batchnorm("norm1", activation="relu")
    graph.shortcut("short", 8, stride=2, source=second)
    graph.add("add2", third)
    graph.average_pool("pool2", 3, stride=1, padding=1)
    graph.conv("conv5", 8, 5, stride=3, padding=2, activation="relu")
    graph.conv("conv6", 4, 3, padding=1)
    graph.global_average_pool("mean")
    graph.linear("fc", 10)
    return graph.finish(10)


def fused_tiles(spec: ModelSpec, seed: int, ranks: int) -> Plan:
    """Return a plan of tiles in which next to all layers are fused that may be, and random ones of these settle."""
    draw = np.random.default_rng([seed, ranks])
    plan = make_plan(spec, "spatial", ranks, BATCH)
    for layer in spec.layers:
        if draw.random() < 0.85:
            with contextlib.suppress(PlanError):
                plan = checked(dataclasses.replace(plan, fused=plan.fused | {layer.name}), spec)
    return settling(plan, spec, draw, (1.0, 0.5, 0.2)[seed % 3])


@pytest.mark.parametrize("preset", ["data", "hybrid", "model"])
def test_global_tensors_are_put_together_and_cut_again(preset):
    on, spec = world(), spec_of("lenet5")
    plan = make_plan(spec, preset, on.size, BATCH)
    model = Model(spec, 3, np.float64, plan.parts(spec, on.rank))
    state = {"velocity": model.parameters.values + 0.5}
    whole, kept = Whole(model, plan, on), model.parameters.values.copy()
    expected = Model(spec, 3, np.float64)
    tensors, slots = whole.tensors(model.parameters.values), whole.tensors(state["velocity"])
    if on.rank == 0:
        for parameter in expected.parameters.parameters:
            np.testing.assert_array_equal(parameter.value, tensors[parameter.name])
            np.testing.assert_array_equal(parameter.value + 0.5, slots[parameter.name])
    room = whole.room(state, {})
    assert whole.is_cut == (preset != "data" and on.size > 1)
    room.parameters.values[...] = -expected.parameters.values  # as if it had been read and broadcast
    room.state["velocity"][...] = 2 * expected.parameters.values
    whole.take(room, state)
    spmd_assert(on.comm, np.array_equal(-kept, model.parameters.values))
    spmd_assert(on.comm, np.array_equal(2 * kept, state["velocity"]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", SMALL)
def test_random_mixtures_of_layouts_train_as_one_process_does(name, seed):
    spec = spec_of(name)
    plan = legal_mix(spec, seed, world().size)
    assert_equal_training(train(world(), spec, plan, steps=2), serial(name, BATCH, steps=2))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["branching", "plain-yolo16"])
def test_gradients_of_borders_that_are_settled_train_as_one_process_does(name, seed):
    spec = spec_of(name)
    plan = fused_tiles(spec, seed, world().size)
    placed = plan.place(spec, BATCH).layers.values()
    if world().size > 1 and seed % 3 < 2:
        assert any(one.returned != one.computed for one in placed)
        assert any(True in one.settled for one in placed)
    assert_equal_training(train(world(), spec, plan, steps=2), serial(name, BATCH, steps=2))
