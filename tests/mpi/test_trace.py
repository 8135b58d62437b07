"""The clocks of the ranks, and their timelines in one file."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from hpcnn.comm import start
from hpcnn.comm.clock import offset_to_root
from hpcnn.errors import ConfigError
from hpcnn.report import trace
from hpcnn.timeline import OFF, Timeline
from tests.checks import spmd_assert

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size

# Half of the fastest of many round trips: microseconds, more where the ranks share few cores with other work.
TOLERANCE_S = 2e-3


@pytest.fixture(scope="module")
def world():
    return start()


@pytest.fixture
def folder(world):
    """Return a folder that all ranks share."""
    path = world.broadcast_obj(tempfile.mkdtemp() if RANK == 0 else None)
    yield Path(path)
    world.barrier()


@pytest.mark.parametrize("root", sorted({0, SIZE - 1}))
@pytest.mark.parametrize("skew_s", [0.03, -7.0, 1e6])
def test_offsets_of_clocks_that_are_apart_are_found(world, skew_s, root):
    offset_s = offset_to_root(world.comm, root=root, clock=lambda: time.perf_counter() + skew_s * RANK)
    spmd_assert(
        world.comm, abs(offset_s - skew_s * (root - RANK)) <= TOLERANCE_S, f"{offset_s} for {skew_s} x {root - RANK}"
    )


def test_ranks_of_one_node_have_one_clock_exactly(world):
    if len(set(world.hostnames)) > 1:
        pytest.skip("the ranks are on several nodes")
    spmd_assert(world.comm, offset_to_root(world.comm) == 0.0, "the offset is not 0")


def test_offsets_wait_for_a_rank_that_comes_late(world):
    if RANK == SIZE - 1:
        time.sleep(0.05)
    offset_s = offset_to_root(world.comm, clock=lambda: time.perf_counter() + 5.0 * RANK)
    spmd_assert(world.comm, abs(offset_s + 5.0 * RANK) <= TOLERANCE_S, f"{offset_s} for {-5.0 * RANK}")


@pytest.mark.parametrize("root", sorted({0, SIZE - 1}))
def test_gather_obj_brings_any_objects_to_the_root_in_the_order_of_ranks(world, root):
    gathered = world.gather_obj({"rank": RANK, "words": "x" * (40_000 * RANK)}, root)
    expected = [{"rank": rank, "words": "x" * (40_000 * rank)} for rank in range(SIZE)] if RANK == root else None
    spmd_assert(world.comm, gathered == expected, "gather_obj returned something else")


def test_gather_obj_cuts_what_is_too_long_for_one_message(world, monkeypatch):
    monkeypatch.setattr("hpcnn.comm.world.CHUNK_BYTES", 1000)
    gathered = world.gather_obj(np.arange(1000 * RANK))
    right = gathered is None if RANK else [1000 * rank for rank in range(SIZE)] == [a.size for a in gathered]
    right = right and (RANK > 0 or all(np.array_equal(a, np.arange(a.size)) for a in gathered))
    spmd_assert(world.comm, right, "gather_obj returned something else")


def test_the_timelines_of_all_ranks_become_one_file(world, folder):
    timeline = Timeline(num_steps=2)
    for number in (1, 2, 3):
        with timeline.step(number):
            with timeline.span("forward", "compute", rank=RANK):
                time.sleep(0.002 * (RANK + 1))
            begin_s = time.perf_counter()
            with timeline.span("barrier", "wait"):
                world.barrier()
            timeline.add("barrier", "communication", begin_s, time.perf_counter(), algorithm="mpi")
    trace.write_trace(world, timeline, folder / "trace.json")
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    hosts = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [f"rank {rank} ({world.hostnames[rank]})" for rank in range(SIZE)] == hosts
    expected = {"step": ["step 1", "step 2"], "compute": ["forward"] * 2, "wait": ["barrier"] * 2}
    expected["communication"] = ["barrier"] * 2
    for rank in range(SIZE):
        mine = [event for event in spans if event["pid"] == rank + 1]
        assert expected == {lane: [e["name"] for e in mine if e["cat"] == lane] for lane in expected}
        assert {rank} == {event["args"]["rank"] for event in mine if event["cat"] == "compute"}
    assert min(event["ts"] for event in spans) == 0.0
    # Nobody leaves a barrier before the last has come: on one clock all waits for it have a moment in common.
    for turn in range(2):
        waits = [[e for e in spans if e["cat"] == "wait" and e["pid"] == rank + 1][turn] for rank in range(SIZE)]
        assert max(wait["ts"] for wait in waits) <= min(wait["ts"] + wait["dur"] for wait in waits)


def test_a_trace_of_nothing_has_its_ranks(world, folder):
    trace.write_trace(world, OFF, folder / "trace.json")
    content = json.loads((folder / "trace.json").read_text())
    assert SIZE == content["otherData"]["ranks"] == sum(e["name"] == "process_name" for e in content["traceEvents"])


def test_a_trace_that_cannot_be_written_is_told_on_all_ranks(world, folder):
    if RANK == 0:
        (folder / "file").write_text("")
    with pytest.raises(ConfigError, match=r"trace: cannot write '.*trace\.json'"):
        trace.write_trace(world, OFF, folder / "file" / "trace.json")
