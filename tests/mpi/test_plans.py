"""Every plan, whatever it cuts, trains the same network as one process that has the whole batch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from functools import cache
from math import prod

import numpy as np
import pytest

from hpcnn.errors import PlanError
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.nn.models.yolo import yolo16
from hpcnn.parallel.exchange import Exchange
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.parallel.program import Program
from hpcnn.parallel.whole import Whole
from hpcnn.plan import placement
from hpcnn.plan.buckets import make_buckets
from hpcnn.plan.layout import Layout
from hpcnn.plan.planner import AXES, PRESETS, Plan, checked, make_plan
from hpcnn.spec import ConvSpec, LinearSpec, ModelSpec
from hpcnn.timeline import Timeline
from tests.checks import spmd_assert
from tests.plans import Result, kinds, train
from tests.worlds import alone, world

BATCH = 7
SHAPES = {
    "lenet5": (28, 28, 1),
    "resnet20": (16, 16, 3),
    "vgg11-32": (32, 32, 3),
    "yolo16": (48, 32, 3),
    "kinds": (9, 7, 3),
}
SMALL = ("lenet5", "resnet20", "yolo16", "kinds")  # VGG takes its time in double precision


@pytest.fixture(autouse=True)
def _small_layers_run_in_pieces_too(monkeypatch):
    monkeypatch.setattr("hpcnn.plan.interior.LEAST_INTERIOR", {ConvSpec: 0.5, LinearSpec: 0.5})


@cache
def spec_of(name: str) -> ModelSpec:
    if name == "branching":
        return branching()
    if name == "kinds":
        return kinds(10)
    if name == "plain-yolo16":
        return yolo16(SHAPES["yolo16"], 10, batchnorm=False)
    return models.build(name, SHAPES[name], 10, 0.25)


@cache
def serial(name: str, batch: int = BATCH, *overrides: str, steps: int = 3) -> Result:
    spec = spec_of(name)
    return train(alone(), spec, make_plan(spec, "data", 1, batch), *overrides, steps=steps)


def assert_equal_training(found: Result, expected: Result, tolerance: float = 1e-9) -> None:
    spmd_assert(world().comm, np.allclose(found.losses, expected.losses, rtol=tolerance))
    if world().rank == 0:
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert ours[name].shape == tensor.shape
                assert np.linalg.norm(ours[name] - tensor) <= tolerance * np.linalg.norm(tensor), name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_preset_trains_as_one_process_does(name, preset):
    spec, steps, batch = spec_of(name), 3 if name in SMALL else 1, BATCH if name in SMALL else 6
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
@pytest.mark.parametrize("preset", ["hybrid", "hybrid-rows", "model", "spatial"])
def test_every_exchange_serves_cut_layers_too(preset, setting):
    spec = spec_of("lenet5")
    plan = make_plan(spec, preset, world().size, BATCH)
    assert_equal_training(train(world(), spec, plan, f"exchange.{setting}"), serial("lenet5"))


@pytest.mark.parametrize("setting", ["train.clip_norm=0.3", "train.optimizer=lars"])
@pytest.mark.parametrize("preset", ["hybrid", "hybrid-rows"])
def test_norms_count_every_part_once(preset, setting):
    spec = spec_of("lenet5")
    plan = make_plan(spec, preset, world().size, BATCH)
    assert_equal_training(train(world(), spec, plan, setting), serial("lenet5", BATCH, setting))


def with_layouts(spec: ModelSpec, **layouts: Layout) -> Plan:
    """Return a plan that cuts samples, and the named layers as told."""
    everywhere = {layer.name: Layout(sample=world().size) for layer in spec.layers} | layouts
    plan = Plan(model=spec.name, ranks=world().size, global_batch=BATCH, layouts=tuple(everywhere.items()))
    return checked(plan, spec)


@pytest.mark.parametrize("classes", [2, 3, 5, 8])
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("axis", ["channel", "inner"])
def test_logits_cut_along_classes_have_the_loss_of_whole_ones(axis, classes, optimizer):
    spec, size = kinds(classes), world().size
    if axis == "channel" and classes < size:
        with pytest.raises(PlanError, match=f"layer 'fc3' has {classes} channels, too few"):
            with_layouts(spec, fc3=Layout(channel=size))
        return
    plan = with_layouts(spec, fc3=Layout(**{axis: size}))
    rule = f"train.optimizer={optimizer}"
    expected = train(alone(), spec, make_plan(spec, "data", 1, BATCH), rule)
    assert_equal_training(train(world(), spec, plan, rule), expected)


@pytest.mark.parametrize("join", ["width", "channel"])
@pytest.mark.parametrize(("left", "right"), [*itertools.permutations(["height", "width", "channel", "sample"], 2)])
def test_branches_of_different_layouts_are_joined(left, right, join):
    spec, size = spec_of("kinds"), world().size
    branches = {"left": left, "left_norm": left, "right": right, "join": join}
    plan = with_layouts(spec, **{name: Layout(**{axis: size}) for name, axis in branches.items()})
    assert_equal_training(train(world(), spec, plan), serial("kinds"))


@pytest.mark.parametrize("axis", ["height", "width", "channel"])
@pytest.mark.parametrize(
    ("name", "below", "layer"), [("kinds", "pool", "flatten"), ("resnet20", "block3_3_add", "pool")]
)
def test_what_needs_whole_images_gathers_them_from_any_layout(name, below, layer, axis):
    spec, size = spec_of(name), world().size
    plan = with_layouts(spec, **{below: Layout(**{axis: size})})
    assert plan.place(spec, BATCH).layers[layer].moved == (size > 1,)
    assert_equal_training(train(world(), spec, plan, steps=2), serial(name, steps=2))


def test_batch_norms_with_cut_channels_know_them_only():
    spec, size = spec_of("kinds"), world().size
    for layout in (Layout(channel=size), Layout(channel=2, sample=max(1, size // 2))):
        if layout.ranks == size:
            plan = with_layouts(spec, left_norm=layout, fc1_norm=layout)
            parts = {part.spec.name: part.spec for part in plan.parts(spec, size - 1)}
            assert parts["left_norm"].statistics["running_mean"] == (7 // layout.channel,)
            assert_equal_training(train(world(), spec, plan), serial("kinds"))


def test_ranks_beyond_the_grid_of_a_batch_norm_add_nothing():
    spec, size = spec_of("kinds"), world().size
    plan = with_layouts(spec, left_norm=Layout(height=max(1, size - 1)), fc1_norm=Layout())
    assert_equal_training(train(world(), spec, plan), serial("kinds"))


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


@pytest.mark.parametrize("preset", ["data", "hybrid", "hybrid-rows", "model"])
def test_global_tensors_are_put_together_and_cut_again(preset):
    on, spec = world(), spec_of("kinds")
    plan = make_plan(spec, preset, on.size, BATCH)
    model = Model(spec, 3, np.float64, plan.parts(spec, on.rank))
    state = {"velocity": model.parameters.values + 0.5}
    whole, kept = Whole(model, plan, on), model.parameters.values.copy()
    expected = Model(spec, 3, np.float64)
    for layer, part in zip(model.layers, model.parts, strict=True):
        for short, statistics in layer.statistics.items():  # the number of each channel
            statistics[...] = np.arange(*part.tensors[short][0])
    tensors, slots = whole.tensors(model.parameters.values), whole.tensors(state["velocity"])
    statistics = whole.statistics()
    if on.rank == 0:
        for parameter in expected.parameters.parameters:
            np.testing.assert_array_equal(parameter.value, tensors[parameter.name])
            np.testing.assert_array_equal(parameter.value + 0.5, slots[parameter.name])
        for name, tensor in expected.statistics.items():
            np.testing.assert_array_equal(np.arange(tensor.size), statistics[name])
    room = whole.room(state, model.statistics)
    assert whole.is_cut == (preset != "data" and on.size > 1)
    room.parameters.values[...] = -expected.parameters.values  # as if it had been read and broadcast
    room.state["velocity"][...] = 2 * expected.parameters.values
    for tensor in room.statistics.values():
        tensor[...] = 3 * np.arange(tensor.size)
    whole.take(room, state)
    spmd_assert(on.comm, np.array_equal(-kept, model.parameters.values))
    spmd_assert(on.comm, np.array_equal(2 * kept, state["velocity"]))
    for layer, part in zip(model.layers, model.parts, strict=True):
        for short, tensor in layer.statistics.items():
            spmd_assert(on.comm, np.array_equal(3 * np.arange(*part.tensors[short][0]), tensor))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SMALL)
def test_random_mixtures_of_layouts_train_as_one_process_does(name, seed):
    spec = spec_of(name)
    plan = legal_mix(spec, seed, world().size)
    assert_equal_training(train(world(), spec, plan, steps=2), serial(name, BATCH, steps=2))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["branching", "plain-yolo16"])
def test_gradients_of_borders_that_are_settled_train_as_one_process_does(name, seed):
    spec = spec_of(name)
    plan = fused_tiles(spec, seed, world().size)
    placed = plan.place(spec, BATCH).layers.values()
    if world().size > 1 and seed % 3 < 2:
        assert any(one.returned != one.computed for one in placed)
        assert any(True in one.settled for one in placed)
    assert_equal_training(train(world(), spec, plan, steps=2), serial(name, BATCH, steps=2))


def test_the_mixtures_cut_everything_that_can_be() -> None:
    seen: dict[str, set[str]] = {}
    for name, seed in itertools.product(SMALL, range(4)):
        spec = spec_of(name)
        layers = {layer.name: layer for layer in spec.layers}
        for layer, layout in legal_mix(spec, seed, 4).layouts:
            kind = f"{type(layers[layer]).__name__} of {len(layers[layer].output_shape)} axes"
            seen.setdefault(kind, set()).update(axis for axis in AXES if getattr(layout, axis) > 1)
    cells = {"sample", "height", "width", "channel"}
    assert seen["ConvSpec of 3 axes"] == {*cells, "inner"}
    assert seen["LinearSpec of 1 axes"] == {"sample", "channel", "inner"}
    assert seen["BatchNormSpec of 3 axes"] == seen["DropoutSpec of 3 axes"] == seen["AddSpec of 3 axes"] == cells
