"""Simulations against the parts they are made of, and what must hold of any machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcnn import configuration
from hpcnn.analysis.forecast import model_of
from hpcnn.errors import PlanError
from hpcnn.plan import machine as machines
from hpcnn.plan.exchanges import choose_buckets
from hpcnn.plan.fabric import Fabric
from hpcnn.plan.machine import Described, Link, Machine
from hpcnn.plan.planner import make_plan
from hpcnn.plan.prediction import predict
from hpcnn.plan.simulation import Series, simulate
from hpcnn.plan.site import Site

CONFIG = configuration.load("lenet5", ["train.global_batch=4096"])
MODEL = model_of(CONFIG)
DATA = Series("data", "allreduce", "ring")
CLUSTER = Machine(
    node=Link(alpha_s=1e-6, beta_s_per_byte=1e-10),
    network=Link(alpha_s=3e-6, beta_s_per_byte=2e-10),
    fabric=Fabric(kind="fat-tree", switch_nodes=(8,), oversubscription=(1.0,)),
    described=Described(sources="made up", ranks_per_node=4, cores_per_rank=2, thread_efficiency=0.75),
)


def test_a_point_is_what_predict_says_of_the_same_plan_on_the_same_nodes():
    (point,) = simulate(CONFIG, MODEL, CLUSTER, [32], [DATA]).points
    site = replace(Site.of(CONFIG, CLUSTER, tuple(rank // 4 for rank in range(32))), algorithm="ring")
    plan = make_plan(MODEL, "data", 32, 4096)
    buckets = choose_buckets(
        MODEL, "allreduce", bucket_bytes=CONFIG.exchange.bucket_bytes, ranks=32, global_batch=4096, plan=plan
    )
    assert point.prediction == predict(MODEL, plan, buckets, site)
    assert [travel.num_bytes for travel in point.travels] == [4 * bucket.size for bucket in buckets]


def test_speed_up_counts_from_one_core():
    one, four = simulate(CONFIG, MODEL, CLUSTER, [1, 4], [DATA]).points
    assert (one.cores, four.cores) == (2, 8)
    assert one.speed_up == pytest.approx(2 * 0.75)
    assert four.speed_up == pytest.approx(1.5 * one.prediction.step_s / four.prediction.step_s)
    assert four.efficiency == pytest.approx(four.speed_up / 8)


def test_with_samples_per_rank_the_batch_grows_and_speed_up_is_by_throughput():
    one, many = simulate(CONFIG, MODEL, CLUSTER, [1, 16], [DATA], samples_per_rank=64).points
    assert (one.global_batch, many.global_batch) == (64, 1024)
    assert many.speed_up == pytest.approx(16 * 1.5 * one.prediction.step_s / many.prediction.step_s)


def test_worse_networks_are_never_faster():
    def step_s(machine: Machine, series: Series, overlap: bool = True) -> float:
        config = replace(CONFIG, exchange=replace(CONFIG.exchange, overlap=overlap))
        return simulate(config, MODEL, machine, [256], [series]).points[0].prediction.step_s

    taper = replace(CLUSTER, fabric=Fabric(kind="fat-tree", switch_nodes=(8,), oversubscription=(16.0,)))
    torus = replace(CLUSTER, fabric=Fabric(kind="torus", shape=(64,), link_speed=0.1))
    narrow = replace(CLUSTER, network=Link(alpha_s=3e-6, beta_s_per_byte=2e-8))
    for name in ("ring", "butterfly", "halving-doubling", "auto"):
        series = Series("data", "allreduce", name)
        usual = step_s(CLUSTER, series)
        assert usual <= min(step_s(other, series) for other in (taper, torus, narrow))
        assert usual <= step_s(CLUSTER, series, overlap=False)
    assert step_s(taper, Series("data", "allreduce", "butterfly")) > step_s(
        CLUSTER, Series("data", "allreduce", "butterfly")
    )


def test_auto_is_no_slower_than_anything_it_compares():
    kinds = [Series("data", kind, "auto") for kind in ("allreduce", "sharded", "factors")]
    auto = Series("auto", "auto", "auto")
    done = simulate(CONFIG, MODEL, CLUSTER, [16, 128], [auto, *kinds, Series("hybrid", "allreduce", "auto")])
    for ranks in (16, 128):
        best, *others = (point for point in done.points if point.ranks == ranks)
        assert all(best.prediction.step_s <= other.prediction.step_s for other in others)


def test_what_cannot_be_run_is_left_out_with_its_reason():
    config = configuration.load("lenet5", ["train.global_batch=8"])
    done = simulate(config, MODEL, CLUSTER, [8, 16], [DATA])
    assert [point.ranks for point in done.points] == [8]
    assert "train.global_batch (=8) is smaller than the number of ranks (=16)" in done.missing[0]
    with pytest.raises(PlanError, match="nothing can be run so"):
        simulate(config, MODEL, CLUSTER, [16], [DATA])


def test_a_torus_that_is_too_small_is_refused():
    torus = replace(CLUSTER, fabric=Fabric(kind="torus", shape=(2, 2)))
    with pytest.raises(PlanError, match="has 4 nodes, and 8 are asked for"):
        simulate(CONFIG, MODEL, torus, [32], [DATA])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("dta", "allreduce", "ring"), r"plan \(='dta'\) is unknown"),
        (("data", "sum", "ring"), r"kind \(='sum'\) is unknown"),
        (("data", "allreduce", "tree"), r"algorithm \(='tree'\) is unknown"),
        (("data", "allreduce", "pairwise"), "moves blocks"),
    ],
)
def test_series_that_do_not_exist_are_refused(words, reason):
    with pytest.raises(PlanError, match=reason):
        Series(*words)


@pytest.mark.parametrize("name", machines.named())
def test_machines_that_come_with_the_package_run_thousands_of_ranks(name):
    config = configuration.load("lenet5", ["train.global_batch=8192"])
    (point,) = simulate(config, MODEL, machines.load(name), [8192], [DATA]).points
    assert 0.0 < point.speed_up <= point.cores
