"""Collectives over real messages, on as many ranks as this runs on."""

from __future__ import annotations

import time

import numpy as np
import pytest
from mpi4py import MPI

from hpcnn import comm
from hpcnn.comm import persistent
from hpcnn.comm.collectives import engine_of, traffic
from hpcnn.comm.engine import Engine
from hpcnn.errors import CommError, PlanError
from hpcnn.geometry import blocks, split
from hpcnn.plan import schedules

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
ALLREDUCE = [*schedules.ALLREDUCE_ALGORITHMS, "mpi", "auto"]
BLOCKS = [*schedules.BLOCK_ALGORITHMS, "mpi", "auto"]
TYPES = ["float32", "float64", "int32", "int64"]
COUNTS = [0, 1, 2, SIZE - 1, SIZE, SIZE + 1, 97, 10_007]


@pytest.fixture(scope="module")
def world():
    duplicate = WORLD.Dup()
    yield duplicate
    duplicate.Free()


def inputs(count: int, dtype: str) -> list[np.ndarray]:
    """Return what every rank brings: small integers, whose sums are exact in every type."""
    return [np.random.default_rng(rank).integers(-50, 50, count).astype(dtype) for rank in range(SIZE)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("algorithm", ALLREDUCE)
def test_allreduce_sums_in_place_on_every_rank(world, algorithm, dtype):
    for count in COUNTS:
        arrays = inputs(count, dtype)
        x = arrays[RANK].copy()
        assert comm.allreduce(world, x, algorithm) is None
        np.testing.assert_array_equal(np.sum(arrays, axis=0), x)
        assert np.dtype(dtype) == x.dtype


@pytest.mark.parametrize("algorithm", schedules.ALLREDUCE_ALGORITHMS)
def test_allreduce_leaves_equal_bits_on_all_ranks(world, algorithm):
    x = np.random.default_rng(RANK).standard_normal((33, 7)).astype(np.float32)
    comm.allreduce(world, x, algorithm)
    assert 1 == len(set(WORLD.allgather(x.tobytes())))


@pytest.mark.parametrize("algorithm", ["butterfly", "halving-doubling"])
def test_allreduce_adds_in_the_canonical_tree(world, algorithm):
    parts = [np.random.default_rng(rank).standard_normal(1003).astype(np.float32) for rank in range(SIZE)]
    x = parts[RANK].copy()
    comm.allreduce(world, x, algorithm)
    pairs = SIZE - (1 << (SIZE.bit_length() - 1))
    tree = [parts[2 * i] + parts[2 * i + 1] for i in range(pairs)] + parts[2 * pairs :]
    while len(tree) > 1:
        tree = [left + right for left, right in zip(tree[::2], tree[1::2], strict=True)]
    np.testing.assert_array_equal(tree[0], x)


@pytest.mark.parametrize("algorithm", schedules.ALLREDUCE_ALGORITHMS)
def test_large_messages_which_leave_only_when_they_are_fetched_are_summed_right(world, algorithm):
    base = np.arange(1_500_001, dtype=np.float32) % 1000
    for _ in range(3):
        x = base * (RANK + 1)
        comm.allreduce(world, x, algorithm)
        np.testing.assert_array_equal(base * (SIZE * (SIZE + 1) // 2), x)


@pytest.mark.parametrize("algorithm", schedules.ALLREDUCE_ALGORITHMS)
def test_tiny_segments_and_chunks_change_nothing(algorithm):
    engine = Engine(WORLD, segment_bytes=60)
    for count in (1, 25, 26, 997, 5000):
        parts = [np.random.default_rng(rank).standard_normal(count) for rank in range(SIZE)]
        expected, actual = parts[RANK].copy(), parts[RANK].copy()
        schedule = schedules.allreduce(algorithm, RANK, SIZE, count)
        engine_of(WORLD).run(schedule, expected)
        cut = engine.prepare(schedule, actual)  # what runs once and is short is never cut
        cut.start()
        cut.wait()
        np.testing.assert_array_equal(expected, actual)
        np.testing.assert_allclose(np.sum(parts, axis=0), actual, rtol=0, atol=1e-13 * SIZE * 5)
    engine.free()


@pytest.mark.parametrize("algorithm", schedules.ALLREDUCE_ALGORITHMS)
def test_the_engine_counts_what_the_schedule_says_however_the_messages_are_cut(algorithm):
    engine = Engine(WORLD, segment_bytes=100)
    schedule = schedules.allreduce(algorithm, RANK, SIZE, 1001)
    before = engine.traffic
    cut = engine.prepare(schedule, np.ones(1001, np.float32))
    for _ in range(2):
        cut.start()
        cut.wait()
    engine.run(schedule, np.ones(1001, np.float32))
    sent = engine.traffic - before
    assert (3 * schedule.num_messages, 12 * schedule.num_elements_sent) == (sent.num_messages, sent.num_bytes)
    engine.free()


def test_several_schedules_in_flight_do_not_mix():
    engine = Engine(WORLD, segment_bytes=1000)
    count = 5000
    arrays = [np.full(count, float((RANK + 1) * 10**i)) for i in range(4)]
    algorithms = ["butterfly", "ring", "halving-doubling", "ring"]
    prepared = [
        engine.prepare(schedules.allreduce(name, RANK, SIZE, count), array, priority=priority)
        for name, array, priority in zip(algorithms, arrays, [3, 1, 2, 1], strict=True)
    ]
    for background in (False, True):
        if background:
            engine.carry_on_in_background()
        for i, array in enumerate(arrays):
            array.fill((RANK + 1) * 10.0**i)
        # Ranks start them in different orders, and wait in others.
        draw = np.random.default_rng(RANK)
        for index in draw.permutation(4):
            prepared[index].start()
        for index in draw.permutation(4):
            prepared[index].wait()
        for i, array in enumerate(arrays):
            np.testing.assert_array_equal(np.full(count, 10.0**i * SIZE * (SIZE + 1) / 2), array)
    assert engine.idle
    engine.free()


def test_the_background_thread_finishes_what_nobody_waits_for():
    engine = Engine(WORLD)
    engine.carry_on_in_background()  # of which one rank has no need
    array = np.ones(300_000, np.float32)
    collective = engine.prepare(schedules.allreduce("halving-doubling", RANK, SIZE, array.size), array)
    for _ in range(3):
        array.fill(1.0)
        collective.start()
        deadline = time.monotonic() + 20
        while not collective.done and time.monotonic() < deadline:
            time.sleep(1e-3)  # no call to the engine
        assert collective.done
        assert np.all(array == SIZE)
    assert engine.communication.exposed_s == 0.0
    assert engine.communication.hidden_s > 0.0
    engine.free()


def test_a_collective_in_flight_is_not_started_again():
    if SIZE == 1:
        pytest.skip("alone, everything is done at once")
    engine = Engine(WORLD)
    collective = engine.prepare(schedules.allreduce("ring", RANK, SIZE, 100), np.ones(100), label="sum of conv1")
    collective.start()
    if not collective.done:
        with pytest.raises(CommError, match="'sum of conv1' is still in flight"):
            collective.start()
    collective.wait()
    engine.free()


@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("algorithm", [*schedules.ALLREDUCE_ALGORITHMS, "mpi", "auto"])
def test_prepared_allreduces_sum_small_integers_exactly_on_any_wire(algorithm, wire):
    if algorithm == "mpi" and wire != "fp32":
        with pytest.raises(CommError, match="not for algorithm 'mpi'"):
            persistent.prepare_allreduce(engine_of(WORLD), np.ones(3, np.float32), algorithm, wire=wire)
        return
    engine = Engine(WORLD, segment_bytes=100)
    parts = [np.random.default_rng(rank).integers(-9, 9, 1003).astype(np.float32) for rank in range(SIZE)]
    array = np.empty(1003, np.float32)
    collective = persistent.prepare_allreduce(engine, array, algorithm, wire=wire)
    for _ in range(2):
        array[...] = parts[RANK]
        collective.start()
        collective.wait()
        np.testing.assert_array_equal(np.sum(parts, axis=0), array)
    engine.free()


@pytest.mark.parametrize("algorithm", [*schedules.BLOCK_ALGORITHMS, "halving-doubling", "mpi", "auto"])
def test_prepared_reduce_scatter_and_allgather_undo_each_other(algorithm):
    engine = Engine(WORLD)
    bounds = [0, *np.cumsum([(rank * 3) % 7 for rank in range(SIZE)]).tolist()]  # rank 0 owns nothing
    array = np.empty(bounds[-1], np.float32)
    scatter = persistent.prepare_reduce_scatter(engine, array, bounds, algorithm)
    gather = persistent.prepare_allgather(engine, array, bounds, algorithm)
    for scale in (1.0, 2.0):
        array[...] = scale * (RANK + 1) * np.arange(bounds[-1])
        scatter.start()
        scatter.wait()
        array[: bounds[RANK]] = np.nan
        array[bounds[RANK + 1] :] = np.nan
        gather.start()
        gather.wait()
        np.testing.assert_array_equal(scale * SIZE * (SIZE + 1) / 2 * np.arange(bounds[-1]), array)
    engine.free()


@pytest.mark.parametrize("algorithm", schedules.ALLREDUCE_ALGORITHMS)
def test_short_arrays_get_the_same_bits_and_accounts_whether_or_not_something_else_is_in_flight(algorithm):
    engine = Engine(WORLD)
    other = engine.prepare(schedules.allreduce("ring", RANK, SIZE, 200_000), np.ones(200_000))
    parts = [np.random.default_rng(rank).standard_normal(1003) for rank in range(SIZE)]
    schedule = schedules.allreduce(algorithm, RANK, SIZE, 1003)
    results, accounts = [], []
    for busy in (False, True):
        x = parts[RANK].copy()
        if busy:
            other.start()
        before = engine.communication
        engine.run(schedule, x, "totals")
        accounts.append((engine.communication - before).traffic)
        other.wait()
        results.append(x.tobytes())
    assert results[0] == results[1]
    assert accounts[0] == accounts[1]
    np.testing.assert_allclose(np.sum(parts, axis=0), np.frombuffer(results[0]), rtol=1e-12, atol=1e-12)
    engine.free()


def test_scratch_memory_is_allocated_once():
    engine = Engine(WORLD)
    schedule = schedules.allreduce("halving-doubling", RANK, SIZE, 50_000)
    engine.run(schedule, np.ones(50_000, np.float32))
    first = [scratch.ctypes.data for scratch in engine.scratch.free]
    for _ in range(3):
        engine.run(schedule, np.ones(50_000, np.float32))
    assert first == [scratch.ctypes.data for scratch in engine.scratch.free]
    assert (SIZE > 1) == (len(first) == 1)
    engine.free()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("algorithm", BLOCKS)
def test_allgather_joins_uneven_blocks_in_the_order_of_ranks(world, algorithm, dtype):
    rows = [(rank * 2) % 5 for rank in range(SIZE)]  # rank 0 brings none
    parts = [np.full((count, 3, 2), rank + 1, dtype) for rank, count in enumerate(rows)]
    for counts in (None, rows):
        whole = comm.allgather(world, parts[RANK], counts=counts, algorithm=algorithm)
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("algorithm", BLOCKS)
def test_reduce_scatter_leaves_each_rank_its_rows_of_the_sum(world, algorithm, dtype):
    for count in COUNTS:
        arrays = [part.reshape(count, 1).repeat(3, axis=1) for part in inputs(count, dtype)]
        rows = split(count, SIZE, RANK)
        mine = comm.reduce_scatter(world, arrays[RANK].copy(), algorithm=algorithm)
        np.testing.assert_array_equal(np.sum(arrays, axis=0)[rows.start : rows.stop], mine)


@pytest.mark.parametrize("algorithm", BLOCKS)
def test_reduce_scatter_obeys_explicit_counts(world, algorithm):
    counts = [rank % 3 for rank in range(SIZE)]
    stop = sum(counts[: RANK + 1])
    x = np.arange(float(sum(counts))) * (RANK + 1)
    mine = comm.reduce_scatter(world, x, counts=counts, algorithm=algorithm)
    expected = np.arange(float(sum(counts))) * (SIZE * (SIZE + 1) / 2)
    np.testing.assert_array_equal(expected[stop - counts[RANK] : stop], mine)


@pytest.mark.parametrize("algorithm", BLOCKS)
def test_reduce_scatter_is_the_adjoint_of_allgather(world, algorithm):
    counts = [block.size for block in blocks(4 * SIZE + 1, SIZE)]
    generator = np.random.default_rng(RANK)
    x, g = generator.standard_normal(counts[RANK]), generator.standard_normal(sum(counts))
    forward = WORLD.allreduce(float(comm.allgather(world, x, counts=counts, algorithm=algorithm) @ g))
    backward = WORLD.allreduce(float(x @ comm.reduce_scatter(world, g, counts=counts, algorithm=algorithm)))
    assert abs(forward - backward) <= 1e-12 * (1 + abs(forward))


def test_traffic_counts_the_collectives_of_one_communicator(world):
    before = traffic(world)
    comm.allreduce(world, np.ones(64 * SIZE, np.float32), "ring")
    comm.allreduce(WORLD, np.ones(64 * SIZE, np.float32), "ring")
    sent = traffic(world) - before
    assert (2 * (SIZE - 1), 2 * (SIZE - 1) * 64 * 4) == (sent.num_messages, sent.num_bytes)
    comm.allreduce(world, np.ones(10, np.float32), "mpi")
    assert (1, 40) == ((traffic(world) - before - sent).num_messages, (traffic(world) - before - sent).num_bytes)


def test_freeing_a_communicator_frees_its_engine():
    for _ in range(3):
        duplicate = WORLD.Dup()
        comm.allreduce(duplicate, np.ones(3), "butterfly")
        engine = engine_of(duplicate)
        assert engine is engine_of(duplicate)
        duplicate.Free()
        assert MPI.COMM_NULL == engine.comm


def test_arrays_that_cannot_be_summed_in_place_are_refused(world):
    for bad in (np.ones((4, 4))[:, ::2], np.broadcast_to(np.ones(1), 4), np.ones(3, bool), np.ones(3, ">f4"), [1.0]):
        with pytest.raises(CommError, match=r"comm: (array|cannot)"):
            comm.allreduce(world, bad)
    with pytest.raises(PlanError, match="unknown algorithm 'tree'"):
        comm.allreduce(world, np.ones(3), "tree")
    with pytest.raises(CommError, match="equally long"):
        engine_of(world).run(schedules.allreduce("ring", RANK, SIZE, 5), np.ones(4))
    with pytest.raises(CommError, match="numbers of rows"):
        comm.reduce_scatter(world, np.ones(4), counts=[4] * (SIZE + 1))
    with pytest.raises(CommError, match="add up"):
        comm.reduce_scatter(world, np.ones(4), counts=[5] * SIZE)
    with pytest.raises(CommError, match="at least one axis"):
        comm.allgather(world, np.array(1.0))
    with pytest.raises(CommError, match="must have counts"):
        comm.allgather(world, np.ones(3), counts=[2] * SIZE)
