"""Predicted steps, against sums that can be done by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from hpcnn.nn import models
from hpcnn.plan.exchanges import choose_buckets
from hpcnn.plan.layer_work import works
from hpcnn.plan.layout import Layout
from hpcnn.plan.machine import Link, Machine, Rates
from hpcnn.plan.planner import Plan, make_plan
from hpcnn.plan.prediction import Prediction, predict
from hpcnn.plan.site import NOWHERE, Journey, Site
from hpcnn.spec import ModelSpec

FREE = Link(alpha_s=1e-9, beta_s_per_byte=0.0)
QUIET = Rates(beside_s_per_byte=0.0)
BATCH = 32


def spec(name: str = "vgg11-32") -> ModelSpec:
    return models.build(name, (32, 32, 3), 10, 0.0)


def foretold(plan: Plan, site: Site, kind: str = "allreduce", model: ModelSpec | None = None) -> Prediction:
    model = model or spec()
    buckets = choose_buckets(
        model,
        kind,
        bucket_bytes=4_000_000,
        ranks=plan.ranks,
        global_batch=plan.global_batch,
        machine=site.machine,
        nodes=site.nodes,
        plan=plan,
    )
    return predict(model, plan, buckets, site)


def site_of(ranks: int, link: Link, rates: Rates = QUIET, **settings: object) -> Site:
    return Site(machine=Machine(network=link, rates=rates, start_s=1e-9), nodes=tuple(range(ranks)), **settings)


def test_one_rank_computes_and_waits_for_nothing():
    plan = make_plan(spec(), "data", 1, BATCH)
    found = foretold(plan, site_of(1, FREE))
    assert found.step_s == pytest.approx(found.compute_s)
    assert found.compute_s == pytest.approx(sum(layer.compute_s for layer in found.layers))
    assert 0 == sum(layer.num_bytes for layer in found.layers)


@pytest.mark.parametrize("preset", ["data", "hybrid", "model", "spatial"])
def test_free_messages_leave_a_rank_its_share_of_the_work(preset):
    rates = replace(QUIET, call_s=1e-12, memory_bytes_per_s=1e15, linear_flops_per_s=5e10)
    alone = foretold(make_plan(spec(), "data", 1, BATCH), site_of(1, FREE, rates))
    found = foretold(make_plan(spec(), preset, 4, BATCH), site_of(4, FREE, rates))
    assert 1.0 <= found.step_s / (alone.step_s / 4) < 1.1


def test_without_overlap_a_step_is_its_computation_and_its_messages():
    plan = make_plan(spec(), "data", 2, BATCH)
    link = Link(alpha_s=1e-9, beta_s_per_byte=1e-8)
    found = foretold(plan, site_of(2, link, algorithm="butterfly", overlap=False))
    bytes_sent = 4 * spec().num_parameters  # one exchange of everything
    assert found.exposed_s == pytest.approx(bytes_sent * (1e-8 + Machine().gamma_s_per_byte), rel=1e-3)
    assert found.step_s == pytest.approx(found.compute_s + found.exposed_s)
    assert bytes_sent == sum(layer.num_bytes for layer in found.layers)


def test_overlap_never_makes_a_step_longer_than_both_nor_shorter_than_the_longer_half():
    plan = make_plan(spec(), "data", 2, BATCH)
    steps = []
    for beta in (1e-10, 1e-9, 1e-8, 1e-7, 1e-6):
        site = site_of(2, Link(alpha_s=1e-9, beta_s_per_byte=beta), algorithm="butterfly")
        for kind in ("allreduce", "sharded"):
            found = foretold(plan, site, kind)
            apart = foretold(plan, replace(site, overlap=False), kind)
            longer = max(apart.compute_s, apart.exposed_s)
            assert longer * (1 - 1e-9) <= found.step_s <= apart.step_s * (1 + 1e-9)
            steps.append(found.step_s)
    assert all(one <= other * (1 + 1e-9) for one, other in pairwise(steps[::2]))


def test_bytes_that_travel_beside_the_computation_lengthen_it():
    plan = make_plan(spec(), "data", 2, BATCH)
    link = Link(alpha_s=1e-9, beta_s_per_byte=1e-9)
    quiet, loud = (foretold(plan, site_of(2, link, replace(QUIET, beside_s_per_byte=b))) for b in (0.0, 1e-9))
    sent = sum(layer.num_bytes for layer in loud.layers)
    assert quiet.compute_s < loud.compute_s <= quiet.compute_s + sent * 1e-9


def test_messages_that_travel_beside_the_computation_lengthen_it_however_short_they_are():
    plan = make_plan(spec(), "data", 2, BATCH)
    link = Link(alpha_s=1e-4, beta_s_per_byte=0.0)
    quiet, loud = (foretold(plan, site_of(2, link, replace(QUIET, beside_share=share))) for share in (0.0, 0.2))
    travels_s = foretold(plan, replace(site_of(2, link, QUIET), overlap=False)).exposed_s
    assert 0 < loud.compute_s - quiet.compute_s <= 0.2 * travels_s
    slow = replace(link, alpha_s=1e3)  # something is always under way from the first gradient on
    quiet, loud = (foretold(plan, site_of(2, slow, replace(QUIET, beside_share=share))) for share in (0.0, 0.2))
    assert 1.1 * quiet.compute_s < loud.compute_s < 1.2 * quiet.compute_s


def test_every_layer_costs_something_each_way_besides_its_operators():
    plan, model = make_plan(spec(), "data", 1, BATCH), spec()
    bare, found = (foretold(plan, site_of(1, FREE, replace(QUIET, layer_s=s))) for s in (0.0, 1e-3))
    assert found.step_s - bare.step_s == pytest.approx(2e-3 * len(model.layers), rel=1e-6)


def test_messages_that_travel_slower_beside_the_computation_leave_more_to_wait_for():
    plan = make_plan(spec(), "data", 2, BATCH)
    link = Link(alpha_s=1e-9, beta_s_per_byte=1e-7)
    apart = foretold(plan, replace(site_of(2, link, QUIET), overlap=False))
    for pace in (1.0, 0.5, 0.25):
        found = foretold(plan, site_of(2, link, replace(QUIET, pace_beside=pace)))
        assert found.compute_s == pytest.approx(apart.compute_s)
        # All that travels is on the wire from the first gradient on, and beside all computation that is left.
        hidden = apart.exposed_s - found.exposed_s
        full = apart.exposed_s - foretold(plan, site_of(2, link, QUIET)).exposed_s
        assert hidden == pytest.approx(pace * full, rel=1e-3)


def test_layers_whose_inputs_are_moved_wait_for_them():
    plan = make_plan(spec(), "hybrid", 4, BATCH)
    found = foretold(plan, site_of(4, Link(alpha_s=1e-9, beta_s_per_byte=1e-8)))
    waits = {layer.name: layer.exposed_s for layer in found.layers}
    assert waits["fc1"] > 0
    assert waits["pool1"] == 0


def test_halos_hide_behind_the_inside_of_their_tiles():
    model = models.build("vgg11", (224, 224, 3), 10, 0.0)
    plan = make_plan(model, "spatial", 2, BATCH)
    site = site_of(2, Link(alpha_s=1e-9, beta_s_per_byte=1e-9))
    waits, apart = (
        {layer.name: layer.exposed_s for layer in foretold(plan, one, model=model).layers}
        for one in (site, replace(site, overlap=False))
    )
    assert waits["conv3_2"] == 0.0 < apart["conv3_2"]


def test_settled_borders_cost_messages_and_save_computation():
    plan = make_plan(spec(), "tiled-groups", 4, BATCH)
    site = site_of(4, Link(alpha_s=1e-9, beta_s_per_byte=1e-9))
    carried, settled = (foretold(one, site) for one in (plan, replace(plan, settled=plan.fused)))
    sent = [sum(layer.num_bytes for layer in one.layers) for one in (carried, settled)]
    assert settled.compute_s < carried.compute_s
    assert sent[1] > sent[0]


def test_memory_counts_outputs_and_what_belongs_to_parameters():
    model = spec()
    plan = make_plan(model, "data", 4, BATCH)
    site = site_of(4, FREE)
    found = foretold(plan, site)
    parameters = 3 * 4 * model.num_parameters
    outputs = (
        4
        * 8
        * sum(
            layer.output_shape[0]
            * (layer.output_shape[1] * layer.output_shape[2] if len(layer.output_shape) == 3 else 1)
            for layer in model.layers
        )
    )
    assert parameters + outputs <= found.memory_bytes <= parameters + 2 * outputs
    assert foretold(plan, replace(site, state_slots=2)).memory_bytes - found.memory_bytes == parameters // 3


def test_synchronised_batch_norms_wait_for_their_sums():
    model = models.build("resnet20", (32, 32, 3), 10)
    plan = make_plan(model, "data", 4, BATCH)
    site = site_of(4, Link(alpha_s=1e-3, beta_s_per_byte=0.0))
    found = [foretold(plan, replace(site, sync_batchnorm=both), model=model) for both in (True, False)]
    norms = sum(layer.parameters.keys() == {"gamma", "beta"} for layer in model.layers)
    assert found[0].exposed_s - found[1].exposed_s == pytest.approx(norms * 2 * 2 * 1e-3, rel=0.1)


def test_partial_sums_are_waited_for_instead_of_inputs():
    model, site = models.build("lenet5", (28, 28, 1), 10), site_of(4, FREE, algorithm="ring")
    plan = make_plan(model, "hybrid-rows", 4, BATCH)
    found = {work.name: work for work in works(model, plan, plan.place(model, BATCH), site)}
    for name, features in (("fc2", 84), ("fc3", 10)):
        assert found[name].there == found[name].back == NOWHERE
        for journey in found[name].sums:
            assert journey.num_bytes == pytest.approx(4 * BATCH * features * 3 / 4, rel=0.1)
    assert found["fc1"].sums == (NOWHERE, NOWHERE)


def test_batch_norms_with_cut_channels_sum_among_those_who_have_the_same():
    model = models.build("resnet20", (32, 32, 3), 10)
    norm = next(layer.name for layer in model.layers if layer.parameters.keys() == {"gamma", "beta"})
    site = site_of(4, FREE)

    def sums(layout: Layout) -> tuple[Journey, Journey]:
        plan = make_plan(model, "data", 4, BATCH)
        plan = replace(plan, layouts=tuple((dict(plan.layouts) | {norm: layout}).items()))
        return next(work for work in works(model, plan, plan.place(model, BATCH), site) if work.name == norm).sums

    assert sums(Layout(channel=4)) == (NOWHERE, NOWHERE)
    halves, whole = sums(Layout(sample=2, channel=2)), sums(Layout(sample=4))
    assert halves[1].num_bytes == 8 * 2 * 8  # one message of the two sums of half of 16 channels
    assert whole[1].num_bytes == 2 * 8 * 2 * 16


def test_ranks_that_are_out_of_step_wait_wherever_they_meet():
    plan = make_plan(spec(), "hybrid", 4, BATCH)
    link = Link(alpha_s=1e-9, beta_s_per_byte=1e-12)
    site = site_of(4, link)
    late = replace(site, machine=replace(site.machine, stall_s=0.5))  # longer than any computation
    found, stalled = foretold(plan, site), foretold(plan, late)
    assert stalled.compute_s == pytest.approx(found.compute_s)
    # fc1's input and the logits; the gradients of both, of which fc1's hides behind its weights' gradient in part.
    assert 3 * 0.5 < stalled.exposed_s - found.exposed_s <= 4 * 0.5 * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["allreduce", "sharded"])
def test_narrow_gradients_are_waited_for_half_as_long(kind):
    plan = make_plan(spec(), "data", 4, BATCH)
    apart = site_of(4, Link(alpha_s=1e-9, beta_s_per_byte=1e-7), overlap=False)
    wide, narrow = (foretold(plan, replace(apart, wire_bytes=size), kind) for size in (4, 2))
    share = 0.5 if kind == "allreduce" else 0.75  # parameters travel as they are
    assert narrow.exposed_s == pytest.approx(share * wide.exposed_s, rel=1e-3)
    assert narrow.compute_s == pytest.approx(wide.compute_s)
