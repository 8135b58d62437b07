"""The world: who is where, and how ranks come to one verdict."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from mpi4py import MPI

from hpcnn.comm import start
from hpcnn.errors import ConfigError, DataError

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

    before = world.traffic
    comm.allreduce(world.comm, np.ones(8, np.float32), "ring")
    assert (SIZE > 1) == ((world.traffic - before).num_messages > 0)
