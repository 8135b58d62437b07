"""Plans that are searched for: found once, the same on all ranks, and training what one process trains."""

from __future__ import annotations

import contextlib

import pytest

from hpcnn import configuration
from hpcnn.plan.machine import Link, Machine
from hpcnn.plan.planner import from_toml, make_plan, to_toml
from hpcnn.plan.search import Search, plan_for
from hpcnn.plan.site import Site
from hpcnn.train.setup import assemble
from tests.checks import spmd_assert
from tests.mpi.test_plans import BATCH, SMALL, assert_equal_training, serial, spec_of, train
from tests.worlds import world

SLOW = Link(alpha_s=2e-4, beta_s_per_byte=8e-8)
DISTANT = Link(alpha_s=2e-2, beta_s_per_byte=1e-10)


@pytest.mark.parametrize(("name", "link"), [*((name, SLOW) for name in SMALL), ("lenet5", DISTANT), ("kinds", DISTANT)])
def test_the_plan_that_is_found_trains_as_one_process_does(name, link):
    spec, ranks, mine = spec_of(name), world().size, ""
    if name in ("yolo16", "resnet20") and ranks > 3:
        pytest.skip("rank 0 searches for ten seconds; the plans of three ranks have all that there is")
    if world().rank == 0:
        site = Site(machine=Machine(network=link), nodes=tuple(range(ranks)))
        mine = to_toml(Search(spec, BATCH, site, kind="auto", bucket_bytes=50_000).plan)
    plan = from_toml(world().broadcast_obj(mine), spec, BATCH)
    assert ranks == 1 or plan.layouts != make_plan(spec, "data", ranks, BATCH).layouts or name != "yolo16"
    assert_equal_training(train(world(), spec, plan), serial(name))


def test_rank_0_looks_for_the_plan_and_all_obey_it():
    on = world()
    settings = ["plan.preset=auto", "exchange.kind=auto", "train.global_batch=64"]
    parts = assemble(configuration.load("lenet5", settings), on)
    with contextlib.closing(parts):
        plan = parts.program.plan
        spmd_assert(on.comm, len(set(on.comm.allgather(plan))) == 1, "plans differ")
        site = Site(machine=Machine(), nodes=on.engine.nodes)
        assert plan == plan_for(parts.config, parts.model.spec, site)
