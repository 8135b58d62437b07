"""Plans: what can be split is, what cannot is refused before any message."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcnn.errors import PlanError
from hpcnn.nn import models
from hpcnn.plan import costs, planner
from hpcnn.spec import ModelSpec


@pytest.fixture
def lenet() -> ModelSpec:
    return models.build("lenet5", (28, 28, 1), 10)


@pytest.mark.parametrize(("batch", "ranks"), [(7, 3), (5, 5), (64, 1), (10, 4)])
def test_every_sample_of_the_batch_belongs_to_exactly_one_rank(lenet: ModelSpec, batch: int, ranks: int) -> None:
    layout = dict(planner.make_plan(lenet, "data", ranks, batch).layouts)["conv1"]
    owned = [position for own in layout.boxes(ranks, batch, (24, 24, 6)) for position in range(*own[0])]
    assert owned == list(range(batch))


def test_a_batch_smaller_than_the_ranks_is_refused_with_both_numbers(lenet: ModelSpec) -> None:
    with pytest.raises(PlanError, match=r"global_batch \(=3\) is smaller than the number of ranks \(=4\)"):
        planner.make_plan(lenet, "data", 4, 3)


def test_a_saved_plan_reads_back_as_it_was(lenet: ModelSpec) -> None:
    plan = planner.make_plan(lenet, "data", 3, 32)
    assert planner.from_toml(planner.to_toml(plan), lenet, 32) == plan


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sample = 3", "sample = 4", "layer 'conv1' has a grid of 4 ranks"),
        ("sample = 3", "sample = 0", "must be at least 1"),
        ("sample = 3", "samples = 3", "unknown key 'samples'"),
        ("sample = 3", "sample = 1\nchannel = 2", "layer 'conv1' is cut along channels.* leaves out some of 3"),
        ('name = "conv1"', 'name = "conv9"', "layers are not those"),
        ("global_batch = 32", "global_batch = 16", "differs from train.global_batch"),
        ("ranks = 3", 'ranks = "three"', "not a plan file"),
        ("[[layer]]", "[[layer", "not a plan file"),
    ],
)
def test_an_edited_plan_is_obeyed_or_refused_with_the_reason(
    lenet: ModelSpec, old: str, new: str, message: str
) -> None:
    text = planner.to_toml(planner.make_plan(lenet, "data", 3, 32))
    assert old in text
    with pytest.raises(PlanError, match=message):
        planner.from_toml(text.replace(old, new, 1), lenet, 32)


def test_settled_layers_are_saved_and_read_back_and_backward_costs_less() -> None:
    model = models.build("vgg11-32", (32, 32, 3), 10)
    plan = planner.make_plan(model, "tiled-groups", 4, 8)
    settled = replace(plan, settled=plan.fused)
    assert not plan.settled
    text = planner.to_toml(settled)
    assert text.count("settle = true") == len(plan.fused) > 0
    assert planner.from_toml(text, model, 8) == settled
    flops = [sum(cost.flops for cost in costs.layer_costs(model, one)) for one in (plan, settled)]
    assert flops[1] < flops[0]
    with pytest.raises(PlanError, match="is not fused to that input"):
        planner.from_toml(text.replace("fused = true\n", ""), model, 8)


def test_layer_costs_follow_the_formulas_of_a_convolution(lenet: ModelSpec) -> None:
    plan = planner.make_plan(lenet, "data", 3, 32)
    by_name = {cost.name: cost for cost in costs.layer_costs(lenet, plan)}
    samples = 11  # the largest of 32 in 3
    assert by_name["conv1"].flops == 2 * samples * 2 * 28 * 28 * 6 * 5 * 5 * 1  # no gradient of the images
    assert by_name["conv2"].flops == 3 * samples * 2 * 10 * 10 * 16 * 5 * 5 * 6
    assert by_name["conv2"].activation_bytes == 4 * samples * 10 * 10 * 16


def test_what_a_layer_fetches_counts_the_busiest_rank() -> None:
    alexnet = models.build("alexnet", (227, 227, 3), 1000)
    fetched = {
        cost.name: cost.moved_bytes for cost in costs.layer_costs(alexnet, planner.make_plan(alexnet, "hybrid", 4, 128))
    }
    assert {"fc1": 4 * 9216 * 96, "fc2": 4 * 128 * 3072, "fc3": 4 * 128 * 3072} == {
        name: count for name, count in fetched.items() if count
    }


def test_partial_sums_are_counted_with_what_a_layer_fetches() -> None:
    alexnet = models.build("alexnet", (227, 227, 3), 1000)
    found = {cost.name: cost for cost in costs.layer_costs(alexnet, planner.make_plan(alexnet, "hybrid-rows", 4, 128))}
    fetched = {name: cost.moved_bytes for name, cost in found.items() if cost.moved_bytes}
    assert fetched == {"fc1": 4 * 9216 * 96, "fc2": 4 * 128 * 3072, "fc3": 4 * 128 * 750}
    assert [found[f"fc{i}"].layout for i in (1, 2, 3)] == ["filter", "row", "row"]
    assert found["fc3"].num_parameters == 1000 * 1024 + 250
    assert found["fc3"].flops == 3 * 128 * 2 * 1000 * 1024


@pytest.mark.parametrize("preset", planner.PRESETS)
def test_every_preset_is_saved_and_read_back(lenet: ModelSpec, preset: str) -> None:
    for ranks in (1, 2, 3, 4, 6):
        plan = planner.make_plan(lenet, preset, ranks, 12)
        assert planner.from_toml(planner.to_toml(plan), lenet, 12) == plan
