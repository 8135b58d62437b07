"""Training on device arrays against the same on the host: with a GPU that is none, strict and late."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.errors import PlanError
from hpcnn.nn.models.yolo import yolo16
from hpcnn.ops import backend
from hpcnn.ops.cuda.types import bfloat16
from hpcnn.plan.planner import Plan, in_turns, make_plan
from hpcnn.spec import ConvSpec, LinearSpec, ModelSpec
from tests.device import FakeCopies, emulated_gpu, fake_gpu
from tests.emulation import build
from tests.plans import Result, kinds, train
from tests.worlds import world

BATCH = 7


@pytest.fixture(autouse=True)
def _small_layers_run_in_pieces_too(monkeypatch):
    monkeypatch.setattr("hpcnn.plan.interior.LEAST_INTERIOR", {ConvSpec: 0.5, LinearSpec: 0.5})


@pytest.fixture
def copies():
    """What stands for the copy streams of the engine and of the images."""
    engine = world().engine
    engine.copies = FakeCopies(seed=world().rank)
    yield FakeCopies(seed=100 + world().rank)
    engine.copies = None


def run(preset: str, *overrides: str, copies: FakeCopies | None = None, **options) -> Result:
    spec = kinds(10)
    plan = make_plan(spec, preset, world().size, BATCH)
    place = "cpu" if copies is None else "cuda"
    return train(world(), spec, plan, *overrides, dtype=np.float32, place=place, copies=copies, **options)


def assert_same(found: Result, expected: Result) -> None:
    np.testing.assert_array_equal(found.losses, expected.losses)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.parametrize("layer", ["fc2", "pool"])
def test_features_on_a_device_are_kept_apart_as_on_the_host(layer, copies):
    recipe = (
        "separation.method=geodesic",
        "separation.dimension=1",
        "separation.weight=9",
        f"separation.layer={layer}",
    )
    with backend.use("numpy"):
        expected = run("data", *recipe)
        assert not np.array_equal(expected.tensors["fc1/weight"], run("data").tensors["fc1/weight"])
    with fake_gpu():
        assert_same(run("data", *recipe, copies=copies), expected)


@pytest.mark.parametrize("preset", ["data", "hybrid", "hybrid-rows", "model", "spatial", "tiled-groups"])
def test_every_preset_trains_on_device_arrays_as_on_the_host(preset, copies):
    with backend.use("numpy"):
        expected = run(preset)
    with fake_gpu():
        assert_same(run(preset, copies=copies), expected)
    assert copies.bytes_up > 0
    assert (world().engine.copies.bytes_down > 0) == (world().size > 1)


@pytest.mark.parametrize("preset", ["data", "hybrid", "spatial"])
@pytest.mark.parametrize(
    "settings",
    [
        ("kind=sharded",),
        ("kind=factors",),
        ("kind=auto", "wire=bf16"),
        ("kind=sharded", "algorithm=mpi"),
        ("algorithm=ring", "overlap=false"),
        ("algorithm=mpi", "wait=step"),
    ],
)
def test_every_exchange_serves_device_arrays(preset, settings, copies):
    settings = [f"exchange.{setting}" for setting in settings]
    with backend.use("numpy"):
        expected = run(preset, *settings)
    with fake_gpu():
        assert_same(run(preset, *settings, copies=copies), expected)


@pytest.mark.skipif(build.COMPILER is None, reason="the emulation of kernels needs g++")
@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        ("data", "factors"),
        *((preset, "allreduce") for preset in ("data", "hybrid", "model", "spatial", "tiled-groups")),
    ],
)
@pytest.mark.parametrize(("activation", "tolerance"), [(np.float32, 2e-5), ("bfloat16", 6e-2)])
def test_emulated_kernels_train_alike(preset, kind, activation, tolerance, copies):
    """bf16: each activation is off by up to 2^-9, and a step's gradient by that times the depth of the net."""
    with backend.use("numpy"):
        expected = run(preset, f"exchange.kind={kind}")
    with emulated_gpu():
        activation = bfloat16() if activation == "bfloat16" else activation
        found = run(preset, f"exchange.kind={kind}", copies=copies, activation=activation)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=tolerance)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == np.float32
        error = np.linalg.norm(found.tensors[name] - tensor)
        assert error <= tolerance * max(np.linalg.norm(tensor), 0.1), name


def test_sums_of_parts_and_turns_are_refused_in_16_bits(copies):
    spec, size = kinds(10), world().size
    plans = [make_plan(spec, "hybrid-rows", size, BATCH)] if size > 1 else []
    for model, plan in (*((spec, plan) for plan in plans), (plain_yolo(), yolo_in_turns())):
        with fake_gpu(), pytest.raises(PlanError, match="needs activations of 32 bits"):
            train(world(), model, plan, dtype=np.float32, place="cuda", copies=copies, activation=bfloat16())


def test_turns_on_device_arrays(copies):
    plan = yolo_in_turns()
    with backend.use("numpy"):
        expected = train(world(), plain_yolo(), plan, dtype=np.float32)
    with fake_gpu():
        assert_same(train(world(), plain_yolo(), plan, dtype=np.float32, place="cuda", copies=copies), expected)


def yolo_in_turns() -> Plan:
    return in_turns(make_plan(plain_yolo(), "data", world().size, BATCH), plain_yolo(), (2, 2))


def plain_yolo() -> ModelSpec:
    return yolo16((48, 32, 3), 10, batchnorm=False)


@pytest.mark.parametrize("rule", ["optimizer=adam", "optimizer=lars", "clip_norm=0.5"])
def test_every_update_serves_device_arrays(rule, copies):
    ours = (f"train.{rule}", "exchange.kind=sharded")
    with backend.use("numpy"):
        expected = run("data", *ours)
    with fake_gpu():
        assert_same(run("data", *ours, copies=copies), expected)
