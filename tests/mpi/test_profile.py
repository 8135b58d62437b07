"""The machine as measured by these ranks: complete, plausible, and the same on all of them."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from hpcnn.analysis.bench_allreduce import bench_allreduce
from hpcnn.analysis.profile_layers import profile_layers
from hpcnn.analysis.profile_machine import profile
from hpcnn.analysis.stopwatch import Stopwatch
from hpcnn.cli import profile as command
from hpcnn.comm import start
from hpcnn.errors import PlanError
from hpcnn.nn import models
from hpcnn.plan.layer_work import works
from hpcnn.plan.machine import Machine, from_toml, load, to_toml
from hpcnn.plan.planner import make_plan
from hpcnn.plan.site import Site
from tests.checks import spmd_assert


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    if start().size > 3:
        pytest.skip("measuring takes half a minute on as many ranks, and three tell as much")
    for name, value in (
        ("stopwatch.USE_UP_S", 0.02),
        ("stopwatch.CALIBRATION_S", 0.1),
        ("profile_machine.BESIDE_S", 0.05),
        ("profile_machine.MEETINGS", 3),
        ("profile_program.LEAST_S", 0.02),
        ("profile_links.LEAST_BYTES", 1024),
    ):
        monkeypatch.setattr(f"hpcnn.analysis.{name}", value)


def test_all_ranks_hold_the_same_complete_machine() -> None:
    world = start()
    check(profile(world, max_bytes=64 << 10, seconds=0.5), world.engine.nodes)


@pytest.mark.parametrize("per_node", [1, 2])
def test_links_between_nodes_are_measured_apart_from_those_inside(per_node) -> None:
    world = start()
    if world.size <= per_node:
        pytest.skip("needs two nodes")
    nodes = tuple(rank // per_node for rank in range(world.size))
    machine = profile(world, max_bytes=16 << 10, seconds=0.5, nodes=nodes)
    check(machine, nodes)
    sharing = 2 if per_node == 2 and world.size % 2 == 0 else 1
    assert 4 * sharing == machine.network.sizes[0]
    if sharing == 1:
        assert 1.0 == machine.network.crossing


def check(machine: Machine, nodes: tuple[int, ...]) -> None:
    """Fail unless the machine is complete, plausible and the same on all ranks."""
    world = start()
    text = to_toml(machine)
    spmd_assert(world.comm, len(set(world.comm.allgather(text))) == 1, "machines differ")
    assert machine == from_toml(text)
    assert (machine.network is None) == (len(set(nodes)) == 1)
    assert (machine.node is None) == (len(set(nodes)) == world.size)
    assert (world.size, len(set(nodes))) == (machine.measured.ranks, machine.measured.hosts)
    for link in filter(None, (machine.node, machine.network)):
        assert all(2 * left == right for left, right in pairwise(link.sizes))
        assert len(link.sizes) > 1
        assert link.sizes[-1] <= 64 << 10
        assert 1.0 <= link.crossing < 1e3
        for times in (link.copy_s, link.sum_s):
            assert all(1e-8 < seconds < 1.0 for seconds in times)
            assert list(times) == sorted(times)
    assert 1e-12 < machine.gamma_s_per_byte < 1e-7
    assert 1e6 < machine.rates.conv_forward_flops_per_s < 1e13


def arguments(**given: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"model": [], "set": [], "batch": None, "preset": ["data"], "layer_seconds": 1.0} | given
    )


def test_the_command_writes_the_file_and_all_ranks_end_alike(tmp_path, capsys) -> None:
    world = start()
    path = world.broadcast_obj(tmp_path) / "machine.toml"
    args = arguments(out=path, max_bytes=256, seconds=0.2, model=["lenet5"], layer_seconds=1.0)
    assert 0 == command.run(args)
    world.barrier()
    machine = load(path)
    assert world.size == machine.measured.ranks
    assert any(timing.layer.startswith("conv 5x5") for timing in machine.timings)
    assert (f"{world.size} ranks on" in capsys.readouterr().out) == (world.rank == 0)
    rows = bench_allreduce(world, sizes=(4, 1024), repeats=1, machine=machine)
    spmd_assert(world.comm, len(set(world.comm.allgather(repr(rows)))) == 1, "rows differ")


def test_a_file_that_cannot_be_written_is_known_before_anything_is_measured(tmp_path) -> None:
    world = start()
    nowhere = world.broadcast_obj(tmp_path) / "missing" / "machine.toml"
    with pytest.raises(PlanError, match=r"cannot write .*--out"):
        command.run(arguments(out=nowhere, max_bytes=4, seconds=1e9))


@pytest.mark.parametrize(("max_bytes", "seconds"), [(3, 1.0), (64, 0.0), (64, float("nan"))])
def test_numbers_that_make_no_sense_are_refused(max_bytes, seconds) -> None:
    with pytest.raises(PlanError, match="--max-bytes"):
        command.run(arguments(out="x", max_bytes=max_bytes, seconds=seconds))


def test_layers_are_timed_in_the_sizes_of_every_preset_that_can_split_them() -> None:
    world, model = start(), models.build("lenet5", (28, 28, 1), 10)
    timings = profile_layers(Stopwatch(world), model, 8, seconds=30.0)
    spmd_assert(world.comm, len(set(world.comm.allgather(timings))) == 1, "timings differ")
    extents = {(timing.layer, timing.extent) for timing in timings}
    assert len(timings) == len(extents)
    samples = -(-8 // world.size)
    assert ("conv 5x5 /1x1 *1x1 g1 relu", (samples, 28, 28, 6, 1)) in extents
    assert ("linear relu", (8, 1, 1, -(-120 // world.size), 400)) in extents  # of the hybrid
    for timing in timings:
        assert 0 < timing.seconds[0] < 1.0
        assert (timing.seconds[2] > 0) == timing.layer.startswith(("conv", "linear"))
    machine = replace(Machine(), timings=timings)
    plan = make_plan(model, "data", world.size, 8)
    found = works(model, plan, plan.place(model, 8), Site(machine=machine, nodes=(0,) * world.size))
    measured = {(timing.layer, timing.extent): timing.seconds for timing in timings}
    assert found[0].passes == measured["conv 5x5 /1x1 *1x1 g1 relu", (samples, 28, 28, 6, 1)]


def test_what_takes_too_long_is_left_out() -> None:
    assert profile_layers(Stopwatch(start()), models.build("lenet5", (28, 28, 1), 10), 8, seconds=-1.0) == ()


def test_computation_is_timed_by_the_clock_where_threads_share_it(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    watch = Stopwatch(start())
    assert watch.stretch == 0.0
    short, long = watch.seconds([lambda: time.sleep(0.001), lambda: time.sleep(0.004)], at_least_s=0.02)
    assert 0.001 <= short < 0.004 <= long < 0.5
