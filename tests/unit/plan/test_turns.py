"""Groups in turns: what belongs to one, what is refused, and the published redundancy of tiles."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import prod

import numpy as np
import pytest

from hpcnn.arrays import Pair
from hpcnn.configuration import load
from hpcnn.errors import PlanError
from hpcnn.geometry import Block
from hpcnn.nn import models
from hpcnn.nn.models.yolo import yolo16
from hpcnn.plan.costs import layer_costs
from hpcnn.plan.layout import Box, Layout, contains, hull, volume
from hpcnn.plan.planner import Plan, checked, from_toml, in_turns, make_plan, to_toml
from hpcnn.plan.prediction import predict
from hpcnn.plan.search import plan_for
from hpcnn.plan.site import Site
from hpcnn.plan.turns import GroupSpec, peak_elements, turn_boxes
from hpcnn.spec import ModelSpec
from tests.chains import in_one_group, in_random_turns, random_chain


@pytest.fixture
def lenet() -> ModelSpec:
    return models.build("lenet5", (28, 28, 1), 10)


def yolo_group() -> GroupSpec:
    spec = yolo16((608, 608, 3), 10, batchnorm=False)
    (group,) = in_one_group(make_plan(spec, "data", 1, 1), spec, (2, 2), "conv12").groups(spec)
    return group


def whole_output(group: GroupSpec, samples: int = 1) -> Box:
    return tuple(Block(0, size) for size in (samples, *group.output_shape))


def edited(plan: Plan, spec: ModelSpec, **keys: str) -> Plan:
    """Return a saved plan with lines added to layers by hand."""
    text = to_toml(plan)
    for layer, lines in keys.items():
        text = text.replace(f'name = "{layer}"\n', f'name = "{layer}"\n{lines}\n')
    return from_toml(text, spec, plan.global_batch)


@pytest.mark.parametrize(
    ("turns", "factor"), [((1, 1), 1.0), ((2, 2), 1.247), ((2, 3), 1.380), ((4, 4), 1.845), ((4, 6), 2.179)]
)
def test_tiles_compute_as_much_twice_as_published(turns: Pair, factor: float) -> None:
    group = yolo_group()
    flops = sum(
        layer.forward_flops * volume(box) / prod(layer.output_shape)
        for boxes in turn_boxes(group, whole_output(group), turns)
        for layer, box in zip(group.layers, boxes[1:], strict=True)
    )
    assert flops / sum(layer.forward_flops for layer in group.layers) == pytest.approx(factor, abs=5e-4)


def test_fused_layers_belong_to_the_group_below_which_the_turns_are_written(lenet: ModelSpec) -> None:
    plan = make_plan(lenet, "data", 3, 6)
    fused = "fused = true"
    one = edited(plan, lenet, pool1=fused, conv2=fused, pool2=f"{fused}\nturns = [2, 3]")
    assert one.turns == (("pool2", (2, 3)),)
    assert [[layer.name for layer in group.layers] for group in one.groups(lenet)] == [
        ["conv1", "pool1", "conv2", "pool2"]
    ]
    short = edited(plan, lenet, pool2=f"{fused}\nturns = [2, 3]")
    assert [[layer.name for layer in group.layers] for group in short.groups(lenet)] == [["conv2", "pool2"]]
    two = edited(
        plan, lenet, conv1=fused, pool1=f"{fused}\nturns = [1, 2]", conv2=fused, pool2=f"{fused}\nturns = [2, 3]"
    )
    assert [([layer.name for layer in group.layers], group.turns) for group in two.groups(lenet)] == [
        (["conv1", "pool1"], (1, 2)),
        (["conv2", "pool2"], (2, 3)),
    ]


@pytest.mark.parametrize("preset", ["data", "spatial", "tiled-groups", "hybrid"])
def test_plans_with_turns_are_saved_and_read_back(lenet: ModelSpec, preset: str) -> None:
    plan = in_turns(make_plan(lenet, preset, 4, 12), lenet, (2, 3))
    assert plan.turns == (("pool1", (2, 3)), ("pool2", (2, 3)))
    assert from_toml(to_toml(plan), lenet, 12) == plan


@pytest.mark.parametrize("turns", ["4", "[2]", "[0, 2]", '["a", 2]', "[1, 2, 3]", "[1.5, 2]"])
def test_turns_that_are_no_grid_are_refused(lenet: ModelSpec, turns: str) -> None:
    with pytest.raises(PlanError, match=r"layer 'pool1': turns .* must be \[rows, columns\]"):
        edited(make_plan(lenet, "data", 1, 6), lenet, pool1=f"fused = true\nturns = {turns}")


def test_a_group_of_one_layer_is_refused(lenet: ModelSpec) -> None:
    with pytest.raises(PlanError, match=r"'pool1' ends a group of turns \[2, 2\] that has no other layer. Set fused"):
        edited(make_plan(lenet, "data", 1, 6), lenet, pool1="turns = [2, 2]")


def test_layers_that_need_more_than_a_tile_are_refused_by_name() -> None:
    resnet = models.build("resnet20", (32, 32, 3), 10)
    plan = make_plan(resnet, "data", 1, 6)
    norm = next(layer for layer in resnet.layers if layer.name.startswith("norm"))
    reader = next(layer for layer in resnet.layers if norm.name in layer.inputs)
    with pytest.raises(PlanError, match=f"'{norm.name}' is a BatchNorm.*Set fused = false for '{reader.name}'"):
        edited(plan, resnet, **{reader.name: "fused = true\nturns = [2, 2]"})
    with pytest.raises(PlanError, match=f"'{norm.name}' is a BatchNorm.*Set no turns for it"):
        edited(plan, resnet, **{norm.name: "fused = true\nturns = [2, 2]"})
    vgg = models.build("vgg11-32", (32, 32, 3), 10, 0.5)
    flat = next(layer.name for layer in vgg.layers if len(layer.output_shape) == 1)
    with pytest.raises(PlanError, match=f"'{flat}' is a Flatten, and not a convolution"):
        edited(make_plan(vgg, "data", 1, 6), vgg, **{flat: "fused = true\nturns = [2, 2]"})


def test_layers_that_several_read_are_refused_by_name() -> None:
    draw = np.random.default_rng(0)
    spec = random_chain(draw)
    while [type(layer).__name__ for layer in spec.layers[:2]] != ["ConvSpec", "ConvSpec"]:
        spec = random_chain(draw)
    first, second, *rest = spec.layers
    twin = replace(second, name="twin")
    forked = replace(spec, layers=(first, second, twin, *rest))
    layouts = tuple((layer.name, Layout()) for layer in forked.layers)
    plan = Plan(model="chain", ranks=1, global_batch=2, layouts=layouts, fused=frozenset({second.name}))
    with pytest.raises(PlanError, match=r"'layer0' is read by 'layer1', 'twin', and not by one layer"):
        checked(replace(plan, turns=((second.name, (2, 2)),)), forked)


def test_filters_that_are_cut_are_refused_with_their_grid(lenet: ModelSpec) -> None:
    plan = make_plan(lenet, "model", 2, 6)
    with pytest.raises(PlanError, match=r"'pool1' has a grid \(1, 1, 1, 2, 1\) that cuts channels"):
        checked(replace(plan, fused=frozenset({"pool1"}), turns=(("pool1", (2, 2)),)), lenet)


def test_windows_that_lie_off_the_image_are_refused(lenet: ModelSpec) -> None:
    conv1, *others = lenet.layers
    wide = replace(conv1, padding=((2, 5), (2, 2)), input_shape=(25, 28, 1))
    spec = replace(lenet, input_shape=(25, 28, 1), layers=(wide, *others))
    plan = make_plan(spec, "data", 1, 6)
    with pytest.raises(
        PlanError, match=r"'conv1' is padded by \(\(2, 5\), \(2, 2\)\), so far that whole windows lie off"
    ):
        checked(replace(plan, fused=frozenset({"pool1"}), turns=(("pool1", (2, 2)),)), spec)


def test_groups_of_the_setting_end_with_poolings() -> None:
    spec = yolo16((64, 64, 3), 10, batchnorm=False)
    groups = in_turns(make_plan(spec, "data", 2, 6), spec, (2, 2)).groups(spec)
    ends = [(group.layers[0].name, group.name) for group in groups]
    assert ends == [("conv1", "pool1"), ("conv2", "pool2"), ("conv3", "pool3"), ("conv6", "pool4"), ("conv9", "conv12")]


def test_a_model_that_begins_with_no_chain_is_refused() -> None:
    resnet = models.build("resnet20", (32, 32, 3), 10)
    with pytest.raises(PlanError, match=r"turns \(=\[2, 2\]\) need two conv.* 'resnet20' does not begin so"):
        in_turns(make_plan(resnet, "data", 1, 6), resnet, (2, 2))


@pytest.mark.parametrize("seed", range(40))
def test_turns_make_all_of_the_output_once_and_read_no_more_than_the_rank_has(seed: int) -> None:
    draw = np.random.default_rng(seed)
    plan = None
    while plan is None:
        spec, ranks = random_chain(draw), int(draw.integers(1, 7))
        with suppress(PlanError):
            plan = in_random_turns(draw, make_plan(spec, str(draw.choice(["spatial", "data"])), ranks, 8), spec)
    placed = plan.place(spec, 8).layers
    for group in plan.groups(spec):
        for rank in range(ranks):
            made = placed[group.name].computed[rank]
            boxes = turn_boxes(group, made)
            assert sum(volume(chain[-1]) for chain in boxes) == volume(made)
            assert not boxes or hull(chain[-1] for chain in boxes) == made
            for chain in boxes:
                assert contains(placed[group.layers[0].name].needed[rank], chain[0])
                for layer, box in zip(group.layers, chain[1:], strict=True):
                    assert contains(placed[layer.name].computed[rank], box)


def test_layer_costs_count_forward_twice_and_borders_as_often_as_they_are_computed(lenet: ModelSpec) -> None:
    whole = {cost.name: cost.flops for cost in layer_costs(lenet, make_plan(lenet, "data", 1, 2))}
    turns = {
        cost.name: cost.flops for cost in layer_costs(lenet, in_turns(make_plan(lenet, "data", 1, 2), lenet, (2, 2)))
    }
    assert turns["conv1"] == 3 * whole["conv1"] // 2  # the windows of the pooling do not overlap: no borders
    assert turns["conv2"] == 4 * whole["conv2"] // 3
    assert turns["fc1"] == whole["fc1"]
    one = in_one_group(make_plan(lenet, "data", 1, 2), lenet, (2, 1), "pool2")
    rows = 2 * 14  # each tile of 5 rows of conv2's 10 reads 5 + 4 of pool1's 14
    conv1 = {cost.name: cost.flops for cost in layer_costs(lenet, one)}["conv1"]
    assert conv1 == pytest.approx(3 * whole["conv1"] / 2 * 2 * 2 * 9 / rows)


def test_predictions_hold_less_in_turns_and_compute_longer() -> None:
    spec, site = yolo16((304, 304, 3), 10, batchnorm=False), Site(nodes=(0, 0))
    whole = make_plan(spec, "data", 2, 4)
    turned = in_turns(whole, spec, (2, 2))
    ours, theirs = (predict(spec, plan, (), site) for plan in (turned, whole))
    assert ours.memory_bytes < 0.5 * theirs.memory_bytes
    assert 4 / 3 * theirs.compute_s * 0.9 < ours.compute_s < 2 * theirs.compute_s
    parameters = 3 * 4 * spec.num_parameters
    most, below = 0, 2 * 304 * 304 * 3
    for group in turned.groups(spec):
        box = turned.place(spec, 4).layers[group.name].computed[0]
        most = max(most, below - volume(turn_boxes(group, box, (1, 1))[0][0]) + peak_elements(group, box))
        below += volume(box)
    assert ours.memory_bytes >= parameters + 4 * most


def test_turns_let_a_preset_fit_into_memory() -> None:
    spec, site = models.build("vgg16", (224, 224, 3), 1000), Site(nodes=(0,))
    tight = ["data.source=synthetic", "train.global_batch=16", "plan.memory_bytes=2_600_000_000"]
    with pytest.raises(PlanError, match=r"preset 'data' needs about \d+ bytes.*or more plan.turns"):
        plan_for(load("vgg16", tight), spec, site)
    assert plan_for(load("vgg16", [*tight, "plan.turns=[4, 4]"]), spec, site).turns


def test_the_peak_of_a_small_group_by_hand(lenet: ModelSpec) -> None:
    plan = edited(make_plan(lenet, "data", 1, 2), lenet, pool1="fused = true\nturns = [2, 1]")
    (group,) = plan.groups(lenet)
    assert lenet.layers[0].activation == "relu"
    images, conv, pooled = 28 * 28, 28 * 28 * 6, 14 * 14 * 6
    whole = images + conv + 2 * conv  # conv1, with its output's gradient before and after the ReLU
    assert peak_elements(group, whole_output(group, 2), whole=True) == 2 * whole
    tile = 16 * 28 + 3 * 14 * 28 * 6  # 14 rows, which read 16: two lie in the padding
    assert peak_elements(group, whole_output(group, 2)) == 2 * (images + pooled + tile)
