"""The world: who is where, and how ranks come to one verdict."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from mpi4py import MPI

from hpcnn.comm import allreduce, library, start
from hpcnn.comm.persistent import prepare_allreduce
from hpcnn.errors import ConfigError, DataError, PlanError

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size


@pytest.fixture(scope="module")
def world():
    return start()


def test_start_returns_one_world_that_knows_its_ranks(world):
    assert world is start()
    assert (RANK, SIZE) == (world.rank, world.size) == (world.comm.rank, world.comm.size)
    assert SIZE == len(world.hostnames)
    assert MPI.Get_processor_name() == world.hostnames[RANK]
    assert MPI.THREAD_MULTIPLE == MPI.Query_thread()


def test_local_ranks_number_the_ranks_of_each_node(world):
    everyone = MPI.COMM_WORLD.allgather((world.hostnames[RANK], world.local_rank, world.local_size))
    for host in set(world.hostnames):
        mine = [entry for entry in everyone if entry[0] == host]
        assert list(range(len(mine))) == sorted(local_rank for _, local_rank, _ in mine)
        assert {len(mine)} == {local_size for _, _, local_size in mine}


def test_threads_of_all_ranks_on_a_node_fit_its_cores(world):
    import threadpoolctl

    cores = len(os.sched_getaffinity(0))
    assert world.num_threads >= 1
    assert world.num_threads * world.local_size <= max(cores, world.local_size)
    for pool in threadpoolctl.threadpool_info():
        assert pool["num_threads"] <= max(world.num_threads, cores // SIZE)


def test_agree_returns_when_no_rank_brings_an_error(world):
    for _ in range(3):
        world.agree(None)


@pytest.mark.parametrize("culprit", {0, SIZE // 2, SIZE - 1})
def test_an_error_on_one_rank_is_raised_on_all_with_its_class_and_rank(world, culprit):
    error = DataError("data: train.h5 is missing.") if culprit == RANK else None
    with pytest.raises(DataError) as caught:
        world.agree(error)
    suffix = f" (on rank {culprit})" if SIZE > 1 else ""
    assert f"data: train.h5 is missing.{suffix}" == str(caught.value)


def test_of_several_errors_the_lowest_rank_is_heard(world):
    mine = ConfigError(f"config: {RANK}.") if RANK == SIZE - 1 else DataError(f"data: {RANK}.")
    with pytest.raises(ConfigError if SIZE == 1 else DataError, match=r": 0\."):
        world.agree(mine)


@pytest.mark.parametrize("root", {0, SIZE - 1})
def test_broadcast_obj_hands_out_any_object(world, root):
    value = {"a": [1, 2, None], "b": "x" * 100_000}
    assert value == world.broadcast_obj(value if root == RANK else None, root)


@pytest.mark.parametrize("root", {0, SIZE - 1})
def test_broadcast_overwrites_arrays_of_any_shape(world, root):
    for shape in ((), (0,), (3, 5), (70_001,)):
        array = np.full(shape, float(RANK))
        world.broadcast(array, root)
        np.testing.assert_array_equal(np.full(shape, float(root)), array)


def test_nobody_leaves_a_barrier_before_the_last_has_come(world):
    world.barrier()
    begin = time.monotonic()
    if RANK == SIZE - 1:
        time.sleep(0.05)
    world.barrier()
    assert time.monotonic() - begin >= 0.04


def test_the_world_counts_its_traffic(world):
    from hpcnn import comm

    before = world.communication
    comm.allreduce(world.comm, np.ones(8, np.float32), "ring")
    assert (SIZE > 1) == ((world.communication - before).traffic.num_messages > 0)


def test_compare_returns_where_all_ranks_hold_the_same(world):
    for things in ({}, {"model": "x" * 10_000, "plan": b"\0\1"}):
        world.compare(things)


def words_on_all_ranks(world, digests) -> str:
    """Return the message of the PlanError that `compare` raises, the same on all ranks."""
    with pytest.raises(PlanError) as caught:
        world.compare(digests, source="vgg16.toml")
    everyone = MPI.COMM_WORLD.allgather(str(caught.value))
    assert {everyone[0]} == set(everyone)
    return everyone[0]


@pytest.mark.skipif(SIZE == 1, reason="one rank agrees with itself")
@pytest.mark.parametrize("culprit", {SIZE // 2, SIZE - 1} - {0})
def test_a_rank_with_another_layout_is_named_on_all_ranks(world, culprit):
    odd = "4 buckets" if culprit == RANK else "5 buckets"
    assert (
        f"plan: rank {culprit} (host {world.hostnames[culprit]}) has another bucket layout than rank 0; all ranks must"
        " read the same configuration. Check that vgg16.toml is the same on every node."
    ) == words_on_all_ranks(world, {"model": "a", "bucket layout": odd})


@pytest.mark.skipif(SIZE == 1, reason="one rank agrees with itself")
def test_of_several_things_that_differ_the_first_is_named_even_where_it_is_missing(world):
    digests = {"model": "a", "plan": "b"} if RANK == 0 else {"plan": "c", "more": "d" * RANK}
    words = words_on_all_ranks(world, digests)
    assert f"{'has' if SIZE == 2 else 'have'} another model than rank 0" in words
    assert words.startswith("plan: rank 1 (host" if SIZE == 2 else "plan: ranks 1")


@pytest.mark.skipif(SIZE == 1, reason="one rank agrees with itself")
def test_ranks_that_differ_among_themselves_are_all_named(world):
    words = words_on_all_ranks(world, {"model": f"{RANK}"})
    hosts = ", ".join(f"{rank} (host {world.hostnames[rank]})" for rank in range(1, SIZE))
    assert (hosts in words) == (SIZE <= 5)


@pytest.mark.parametrize(("cores", "num_threads"), [(0.45, 1), (float(SIZE), 1), (3.0 * SIZE, 3)])
def test_a_quota_over_all_ranks_of_a_node_is_divided_among_them(monkeypatch, cores, num_threads):
    # Rank 0 alone is in another group, with plenty.
    mine = {"job": cores} | ({"first": 1000.0} if RANK == 0 else {})
    monkeypatch.setattr(library, "cpu_quotas", lambda: mine)
    monkeypatch.setattr(library, "_cores", lambda: frozenset(range(16 * SIZE)))
    share = library.node_share(MPI.COMM_WORLD)
    if share.local_size == SIZE:
        assert (cores, SIZE, num_threads) == (share.quota_cores, share.num_sharing_quota, share.num_threads)
        assert (cores < SIZE) == share.rationed


@pytest.mark.parametrize("parity", [True, False])
def test_a_group_of_the_ranks_is_a_world_of_its_own(world, parity):
    color = RANK % 2 if parity else RANK // 2
    mine = [rank for rank in range(SIZE) if (rank % 2 if parity else rank // 2) == color]
    group = world.split(color)
    assert (mine.index(RANK), len(mine), tuple(mine)) == (group.rank, group.size, group.ranks)
    assert [world.hostnames[rank] for rank in mine] == list(group.hostnames)
    assert (world.local_rank, world.num_threads) == (group.local_rank, group.num_threads)
    array = np.full(5, 1.0 + RANK)
    prepared = prepare_allreduce(group.engine, array, "butterfly")
    prepared.start()
    everyone = np.array([float(RANK)])
    allreduce(world.comm, everyone)  # meets nobody's messages in the groups
    prepared.wait()
    assert array.tolist() == [sum(1.0 + rank for rank in mine)] * 5
    assert everyone.tolist() == [SIZE * (SIZE - 1) / 2]
    with pytest.raises(DataError, match=r"only here" if len(mine) == 1 else r"only here \(on rank 0\)"):
        group.agree(DataError("only here") if group.rank == 0 else None)
    inner = group.split(0)
    assert inner.ranks == group.ranks
