"""The partitioner: chains of units, and plans that are the fastest of all that can be tried."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from hpcnn import configuration
from hpcnn.errors import PlanError
from hpcnn.nn import models
from hpcnn.plan import planner
from hpcnn.plan.chain import grids, units_of
from hpcnn.plan.exchanges import choose_buckets
from hpcnn.plan.layout import Layout
from hpcnn.plan.machine import Link, Machine, Rates
from hpcnn.plan.planner import PRESETS, Plan, checked
from hpcnn.plan.prediction import predict
from hpcnn.plan.search import Search, plan_for
from hpcnn.plan.site import Site
from hpcnn.spec import INPUT, ModelSpec

SLOW = Link(alpha_s=2e-4, beta_s_per_byte=8e-8)
FAST = Link(alpha_s=2e-6, beta_s_per_byte=1e-10)


def site_of(ranks: int, link: Link) -> Site:
    return Site(machine=Machine(network=link), nodes=tuple(range(ranks)))


def search_of(model: ModelSpec, ranks: int, batch: int, link: Link, **settings: object) -> Search:
    return Search(model, batch, site_of(ranks, link), bucket_bytes=4_000_000, **settings)


@pytest.mark.parametrize("name", ["lenet5", "alexnet", "vgg16", "resnet20", "resnet50", "yolo16"])
def test_units_cover_the_model_and_only_one_value_lives_between_them(name):
    model = models.build(name, (28, 28, 1) if name == "lenet5" else (96, 96, 3), 10)
    units = units_of(model)
    assert model.layers == tuple(layer for unit in units for layer in unit.layers)
    made = {INPUT}
    for unit, following in itertools.pairwise(units):
        made |= {layer.name for layer in unit.layers}
        rest = [layer for layer in model.layers if layer.name not in made]
        assert {source for layer in rest for source in layer.inputs if source in made} == {unit.layers[-1].name}
        assert following.layers[0] is rest[0]
    blocks = {"resnet20": 9, "resnet50": 16}.get(name, 0)
    assert blocks == sum(len(unit.layers) > 1 for unit in units)


def test_grids_use_all_ranks_once_each():
    for ranks in range(1, 17):
        found = grids(ranks, 64)
        assert len(found) == len(set(found))
        assert {ranks} == {grid.ranks for grid in found}
    assert all(grid.sample <= 2 for grid in grids(8, 2))


@pytest.mark.parametrize("link", [SLOW, FAST], ids=["slow", "fast"])
@pytest.mark.parametrize(("name", "shape", "batch"), [("alexnet", (227, 227, 3), 128), ("resnet20", (32, 32, 3), 64)])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_auto_is_predicted_to_be_no_slower_than_any_preset(name, shape, batch, ranks, link):
    search = search_of(models.build(name, shape, 10), ranks, batch, link)
    assert set(PRESETS) == set(search.presets)
    fastest = min(one.prediction.step_s for one in search.presets.values())
    assert search.best.prediction.step_s <= fastest * 1.01
    plan = search.plan
    assert plan == planner.from_toml(planner.to_toml(plan), models.build(name, shape, 10), batch)


def test_no_mix_of_layouts_of_a_small_model_is_faster():
    model, ranks, batch = models.build("lenet5", (28, 28, 1), 10), 2, 8
    site = site_of(ranks, SLOW)
    search = search_of(model, ranks, batch, SLOW)
    fastest = float("inf")
    options = [
        [grid for grid in grids(ranks, batch) if (unit.assigned(grid, ranks) or {}).get(unit.layers[0].name) == grid]
        for unit in search.units
    ]
    tried = 0
    for mix in itertools.product(*options):
        layouts = tuple((unit.layers[0].name, grid) for unit, grid in zip(search.units, mix, strict=True))
        plan = Plan(model=model.name, ranks=ranks, global_batch=batch, layouts=layouts)
        try:
            checked(plan, model)
        except PlanError:
            continue
        buckets = choose_buckets(
            model, "allreduce", bucket_bytes=4_000_000, ranks=ranks, global_batch=batch, machine=site.machine, plan=plan
        )
        fastest = min(fastest, predict(model, plan, buckets, site).step_s)
        tried += 1
    assert tried > 500
    assert search.best.prediction.step_s <= fastest * 1.02


def test_fully_connected_layers_are_cut_where_links_are_slow():
    search = search_of(models.build("alexnet", (227, 227, 3), 1000), 4, 128, SLOW)
    layouts = dict(search.best.plan.layouts)
    assert layouts["fc1"].cut > 1
    assert Layout(sample=4) == layouts["conv1"]
    runner = search.runners()["fc1"]
    assert runner.step_s > 0
    assert runner.step_s == pytest.approx(runner.compute_s + runner.exposed_s)


def test_tiles_are_grouped_where_messages_are_dear_and_not_where_they_cost_nothing():
    model = models.yolo.yolo16((304, 304, 3), 10, batchnorm=False)
    dear, free = (
        search_of(model, 4, 1, link).best.plan
        for link in (Link(alpha_s=2e-2, beta_s_per_byte=1e-10), Link(alpha_s=1e-9, beta_s_per_byte=0.0))
    )
    assert dict(dear.layouts)["conv1"].height > 1
    assert len(dear.fused) > 5

    def fetches(plan: Plan) -> int:
        return sum(any(placed.moved) for placed in plan.place(model, 1).layers.values())

    assert fetches(dear) < fetches(free)


def test_a_limit_of_memory_is_kept_and_an_impossible_one_names_the_least():
    model = models.build("alexnet", (227, 227, 3), 1000)
    # Gathers are dear and gradients cost nothing, so whole weights on every rank are best.
    machine = Machine(node=Link(alpha_s=0.02, beta_s_per_byte=0.0), rates=Rates(update_bytes_per_s=1e15))
    site = Site(machine=machine, nodes=(0, 0, 0, 0))
    fastest = Search(model, 1024, site, bucket_bytes=4_000_000).best
    limit = fastest.prediction.memory_bytes - 1
    smaller = Search(model, 1024, site, bucket_bytes=4_000_000, memory_bytes=limit).best
    assert dict(fastest.plan.layouts)["fc1"].channel == 1
    assert smaller.prediction.memory_bytes <= limit
    assert smaller.prediction.step_s >= fastest.prediction.step_s
    with pytest.raises(PlanError, match=r"fits into plan.memory_bytes \(=1000000\); the smallest needs \d{8,} bytes"):
        _ = search_of(model, 4, 128, FAST, memory_bytes=1_000_000).best


def test_the_exchange_is_chosen_with_the_plan_and_obeyed():
    model = models.build("alexnet", (227, 227, 3), 1000)
    search = search_of(model, 4, 128, SLOW, kind="auto")
    named = dict(search.plan.exchange)
    assert {layer.name for layer in model.layers if layer.parameters} == set(named)
    buckets = choose_buckets(model, "auto", bucket_bytes=4_000_000, ranks=4, global_batch=128, plan=search.plan)
    assert named == {name: bucket.kind for bucket in buckets for name in bucket.layers}
    forced = replace(search.plan, exchange=(("conv1", "factors"),))
    with pytest.raises(PlanError, match="'conv1' cannot exchange factors"):
        choose_buckets(model, "auto", bucket_bytes=1, ranks=4, global_batch=128, plan=forced)
    with pytest.raises(PlanError, match=r"exchange \(='pigeon'\)"):
        choose_buckets(
            model,
            "auto",
            bucket_bytes=1,
            ranks=4,
            global_batch=128,
            plan=replace(forced, exchange=(("conv1", "pigeon"),)),
        )


def test_a_preset_that_does_not_fit_is_refused():
    model, site = models.build("lenet5", (28, 28, 1), 10), site_of(2, FAST)
    config = configuration.load("lenet5", ["plan.memory_bytes=1000"])
    with pytest.raises(PlanError, match=r"preset 'data' needs about \d+ bytes .* plan.memory_bytes \(=1000\)"):
        plan_for(config, model, site)
    plan = plan_for(configuration.load("lenet5", ["plan.preset=auto"]), model, site)
    assert plan.exchange == ()
