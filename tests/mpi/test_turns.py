"""Groups that ranks compute tile after tile, inside plans that cut samples and images."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from hpcnn.errors import PlanError
from hpcnn.nn.models.yolo import yolo16
from hpcnn.plan.planner import Plan, checked, in_turns, make_plan
from hpcnn.spec import ModelSpec, PoolSpec
from tests.chains import in_one_group, in_random_turns, random_chain
from tests.mpi.test_plans import Result, assert_equal_training, spec_of, train
from tests.worlds import alone, world

BATCH = 7


@cache
def yolo() -> ModelSpec:
    return yolo16((48, 32, 3), 10, batchnorm=False)


@cache
def serial(spec: ModelSpec, batch: int = BATCH) -> Result:
    return train(alone(), spec, make_plan(spec, "data", 1, batch))


@pytest.mark.parametrize("setting", ["kind=allreduce", "kind=sharded", "kind=auto", "overlap=false", "wait=step"])
@pytest.mark.parametrize("preset", ["data", "spatial", "hybrid"])
def test_turns_train_as_one_process_does(preset, setting):
    spec = spec_of("lenet5")
    plan = in_one_group(make_plan(spec, preset, world().size, BATCH), spec, (3, 2), "pool2")
    assert_equal_training(train(world(), spec, plan, f"exchange.{setting}"), serial(spec))


@pytest.mark.parametrize("kind", ["allreduce", "sharded"])
@pytest.mark.parametrize("preset", ["data", "spatial"])
def test_layers_of_the_tiled_groups_study_train_in_turns(preset, kind):
    plan = in_turns(make_plan(yolo(), preset, world().size, 5), yolo(), (2, 2))
    assert_equal_training(train(world(), yolo(), plan, f"exchange.kind={kind}"), serial(yolo(), 5))


def test_groups_whose_borders_come_from_other_ranks():
    plan = make_plan(yolo(), "tiled-groups", world().size, 5)
    pools = [layer.name for layer in yolo().layers if isinstance(layer, PoolSpec) and layer.name in plan.fused]
    assert len(pools) >= 3
    plan = checked(replace(plan, turns=tuple((name, (2, 2)) for name in pools)), yolo())
    if world().size > 1:
        placed = plan.place(yolo(), 5).layers
        assert any(placed[group.layers[0].name].moved[0] for group in plan.groups(yolo()))
    assert_equal_training(train(world(), yolo(), plan, "exchange.kind=sharded"), serial(yolo(), 5))


@pytest.mark.parametrize("preset", ["data", "spatial"])
def test_ranks_that_have_nothing_of_a_group_take_part(preset):
    spec = spec_of("lenet5")
    plan = replace(in_turns(make_plan(spec, preset, world().size, BATCH), spec, (2, 2)), global_batch=1)
    assert_equal_training(train(world(), spec, plan), serial(spec, 1))


def random_plan(seed: int, ranks: int) -> tuple[ModelSpec, Plan]:
    """Return a random chain and a plan that cuts samples or images and has groups in turns."""
    draw = np.random.default_rng([seed, ranks])
    while True:
        spec = random_chain(draw)
        try:
            plan = make_plan(spec, str(draw.choice(["data", "spatial", "spatial"])), ranks, BATCH)
        except PlanError:
            continue
        if (found := in_random_turns(draw, plan, spec)) is not None:
            return spec, found


@pytest.mark.parametrize("seed", range(15))
def test_random_groups_of_random_chains_train_as_one_process_does(seed):
    spec, plan = random_plan(seed, world().size)
    kind = ["allreduce", "sharded"][seed % 2]
    assert_equal_training(train(world(), spec, plan, f"exchange.kind={kind}"), serial(spec))
