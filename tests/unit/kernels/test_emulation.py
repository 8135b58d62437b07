"""The emulation of CUDA does what a GPU does, in whatever order threads run, and refuses what a GPU gets wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcnn.ops.cuda import types
from tests.emulation import build
from tests.emulation.emulator import ASCENDING, DESCENDING, EmulationError, Emulator

KERNELS = Path(build.HERE) / "kernels"
LANES = np.arange(32)


@pytest.fixture(params=[ASCENDING, DESCENDING, 2, 3], ids=lambda order: f"order{order}")
def emulator(request):
    """An emulator of the test's own kernels, in one order."""
    if build.COMPILER is None:
        pytest.skip("the emulation of kernels needs g++")
    return Emulator(order=request.param, folders=[KERNELS])


def test_barriers_order_what_threads_write(emulator, random) -> None:
    x = random.standard_normal(1024).astype(np.float32)
    y = emulator.empty((1024,), np.float32)
    emulator.launch("exchange", "block_sum_f32", (4,), (256,), emulator.upload(x), y, np.int32(1000))
    sums = np.pad(x[:1000], (0, 24)).reshape(4, 256).sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(y.reshape(4, 256), np.repeat(sums[:, None], 256, axis=1), rtol=1e-4)


def test_a_race_shows(emulator, random) -> None:
    y = emulator.empty((256,), np.float32)
    emulator.launch("exchange", "racing_sum_f32", (1,), (256,), emulator.upload(np.ones(256, np.float32)), y)
    assert np.isnan(y).sum() == 128  # of every pair of threads the first one reads too early


def test_orders_differ_from_launch_to_launch() -> None:
    emulator = Emulator(folders=[KERNELS])
    seen = set()
    for _ in range(4):
        y = emulator.empty((256,), np.float32)
        emulator.launch("exchange", "racing_sum_f32", (1,), (256,), np.ones(256, np.float32), y)
        seen.add(np.isnan(y).tobytes())
    assert len(seen) == 4


def test_shuffles_and_votes(emulator) -> None:
    y, votes = emulator.empty((7, 32), np.int32), emulator.empty((3, 32), np.uint32)
    emulator.launch("exchange", "shuffles", (1,), (32,), y, votes)
    expected = [
        LANES * 5 % 32,
        LANES ^ 3,
        np.where(LANES < 28, LANES + 4, LANES),
        np.where(LANES >= 4, LANES - 4, LANES),
        np.where(LANES % 8 >= 3, LANES - 3, LANES),
        LANES ^ 16,
        np.where(LANES < 16, LANES ^ 1, LANES ^ 7),
    ]
    np.testing.assert_array_equal(y, expected)
    assert (votes[0] == sum(1 << lane for lane in range(0, 32, 3))).all()
    assert (votes[1:] == 1).all()


def test_threads_may_leave_early(emulator) -> None:
    y = emulator.empty((100,), np.int32)
    emulator.launch("exchange", "early_exit", (1,), (100,), y, np.int32(70))
    np.testing.assert_array_equal(y[:70], 70 + (np.arange(70) ^ 1))
    assert (y[70:] == -1).all()


def test_votes_of_a_block(emulator) -> None:
    y = emulator.empty((100,), np.int32)
    for limit, expected in ((60, 1060), (100, 11100)):
        emulator.launch("exchange", "votes_of_block", (1,), (100,), y, np.int32(limit))
        assert (y == expected).all()


def test_threads_wait_for_conditions(emulator) -> None:
    y = emulator.empty((128,), np.int32)
    emulator.launch("exchange", "turns", (1,), (128,), y, np.int32(4))
    np.testing.assert_array_equal(y, 4 - np.arange(128) // 32)
    with pytest.raises(EmulationError, match=r"wait for ever: .*thread \(\d+, 0, 0\) waits for a condition at"):
        emulator.launch("exchange", "turns", (1,), (128,), y, np.int32(3))


def test_the_last_block_sees_all_others(emulator, random) -> None:
    x = emulator.upload(random.standard_normal(37).astype(np.float32))
    arrived = emulator.upload(np.zeros(1, np.uint32))
    partial, y = emulator.empty((37,), np.float32), emulator.empty((), np.float32)
    emulator.launch("exchange", "last_block", (37,), (32,), x, partial, arrived, y)
    np.testing.assert_allclose(y, x.sum(dtype=np.float64), rtol=1e-5)


def test_every_thread_knows_its_place(emulator) -> None:
    grid, block = (3, 2, 4), (5, 3, 2)
    y = emulator.empty((*grid[::-1], *block[::-1]), np.int32)
    emulator.launch("exchange", "places", grid, block, y)
    bz, by, bx, tz, ty, tx = np.indices(y.shape)
    np.testing.assert_array_equal(y, 100000 * bz + 10000 * by + 1000 * bx + 100 * tz + 10 * ty + tx)


def test_bfloat16_rounds_to_the_nearest_even(emulator, random) -> None:
    bits = random.integers(0, 2**32, 4096, dtype=np.uint32)
    bits[::2] &= 0xFFFF8000  # ties
    bits[:3] = np.array([np.inf, -np.inf, np.nan], np.float32).view(np.uint32)
    x = bits.view(np.float32)
    y, back = emulator.empty(x.shape, types.bfloat16()), emulator.empty(x.shape, np.float32)
    emulator.launch("exchange", "round_bf16", (16,), (256,), x, y, back, np.int32(4096))
    with np.errstate(invalid="ignore"):
        expected = x.astype(types.bfloat16()).astype(np.float32)
    np.testing.assert_array_equal(y.astype(np.float32), expected)
    np.testing.assert_array_equal(back, expected)


ARGUMENTS = {
    "conv": np.array((7, *range(14), 3), types.CONV2D),
    "a": np.float32(0.5),
    "b": np.int32(-6),
    "c": np.int64(1 << 40),
    "d": np.uint8(200),
    "e": np.uint32(1 << 31),
}


def test_arguments_arrive(emulator) -> None:
    y = emulator.empty((6,), np.float64)
    emulator.launch("exchange", "parameters", (1,), (1,), *ARGUMENTS.values(), y)
    np.testing.assert_array_equal(y, [307, 0.5, -6, 1 << 40, 200, 1 << 31])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("conv", np.zeros((), [("n", np.int32)])),
        ("conv", np.int32(1)),
        ("conv", np.zeros(1, types.CONV2D)),
        ("conv", None),
        ("a", np.float64(0.5)),
        ("a", np.int32(1)),
        ("a", 0.5),
        ("b", 6),
        ("b", np.int64(6)),
        ("b", np.uint32(6)),
        ("b", np.float32(6)),
        ("b", np.zeros(1, np.int32)),
        ("c", np.int32(6)),
        ("d", True),
        ("y", np.zeros(6, np.float32)),
        ("y", np.zeros(6, np.int64)),
        ("y", np.zeros(12)[::2]),
        ("y", np.float64(1)),
        ("y", 0),
    ],
)
def test_wrong_arguments_are_refused(name, wrong) -> None:
    emulator = Emulator(folders=[KERNELS])
    arguments = {**ARGUMENTS, "y": emulator.empty((6,), np.float64)}
    emulator.launch("exchange", "parameters", (1,), (1,), *arguments.values())
    with pytest.raises(TypeError, match=f"parameters: argument {list(arguments).index(name)}"):
        emulator.launch("exchange", "parameters", (1,), (1,), *{**arguments, name: wrong}.values())
    with pytest.raises(TypeError, match="6 arguments for 7 parameters"):
        emulator.launch("exchange", "parameters", (1,), (1,), *list(arguments.values())[:-1])


def test_wrong_launches_are_refused(emulator) -> None:
    y = emulator.empty((1024,), np.float32)
    for grid, block, problem in (
        ((0,), (32,), "grid"),
        ((1, 65536), (32,), "grid"),
        ((1,), (1025,), "block"),
        ((1,), (512,), "launch bounds allow 256"),
    ):
        with pytest.raises(EmulationError, match=problem):
            emulator.launch("exchange", "block_sum_f32", grid, block, y, y, np.int32(0))
    with pytest.raises(EmulationError, match="shared memory; sm_80 has 166912"):
        Emulator(80, folders=[KERNELS]).launch("faults", "write_shared", (1,), (1,), np.int32(0), shared_bytes=200000)
    with pytest.raises(EmulationError, match="has no kernel"):
        emulator.launch("exchange", "block_sum_f64", (1,), (1,))
    with pytest.raises(EmulationError, match="there is no"):
        emulator.launch("nowhere", "block_sum_f64", (1,), (1,))


FAULTS = {
    "divergent_barrier": r"divergent barrier: thread .* waits for the block at .*faults.cu:\d+",
    "barrier_against_lanes": "wait for ever:(?=.*waits for the block at)(?=.*waits for other lanes at)",
    "masks_apart": "wait for ever:(?=.*waits for the block at)(?=.*waits for other lanes at)",
    "lanes_apart": "lanes of a warp do different things",
}


@pytest.mark.parametrize("kernel", FAULTS)
def test_threads_that_never_meet_are_reported(emulator, kernel) -> None:
    y = emulator.upload(np.zeros(64, np.int32))
    with pytest.raises(EmulationError, match=rf"{kernel} \(order \d\): .*{FAULTS[kernel]}"):
        emulator.launch("faults", kernel, (2,), (64,), y)


def test_products_take_a_whole_warp(emulator) -> None:
    with pytest.raises(EmulationError, match="mma by the lanes 0000ffff"):
        emulator.launch("faults", "product_of_half_a_warp", (1,), (16,), emulator.empty((16,), np.float32))


@pytest.mark.parametrize("num_bytes", [1000, 2048])
def test_dynamic_shared_memory_has_an_end(emulator, num_bytes) -> None:
    emulator.launch("faults", "write_shared", (1,), (1,), np.int32(num_bytes - 1), shared_bytes=num_bytes)
    for outside in (num_bytes, 100000):
        with pytest.raises(EmulationError, match=r"dynamic shared memory"):
            emulator.launch("faults", "write_shared", (1,), (1,), np.int32(outside), shared_bytes=num_bytes)
    y = emulator.empty((1,), np.float32)
    with pytest.raises(
        EmulationError, match=rf"block \(0, 0, 0\), thread \(0, 0, 0\): access to byte \d+ of {num_bytes}"
    ):
        emulator.launch("faults", "read_shared", (1,), (1,), y, np.int32(512), shared_bytes=num_bytes)
    emulator.launch("faults", "read_shared", (1,), (1,), y, np.int32(num_bytes // 4 - 1), shared_bytes=num_bytes - 4)
    assert np.isnan(y)


def test_indices_of_shared_arrays_are_checked(emulator) -> None:
    y = emulator.empty((32,), np.int32)
    emulator.launch("faults", "index_shared", (1,), (32,), y, np.int32(7))
    with pytest.raises(EmulationError, match=r"index 8 outside its array at .*faults.cu:\d+"):
        emulator.launch("faults", "index_shared", (1,), (32,), y, np.int32(8))


def test_shared_memory_starts_undefined_in_every_block(emulator) -> None:
    y = emulator.empty((2, 32), np.float32)
    emulator.launch("faults", "read_unwritten", (2,), (32,), y)
    assert (y[0] == 1).all()
    assert np.isnan(y[1]).all()


def test_addresses_outside_arrays_are_reported(emulator) -> None:
    x, y = emulator.upload(np.ones(33, np.float32)), emulator.empty((32,), np.float32)
    emulator.launch("faults", "read_global", (1,), (32,), x, y, np.int32(32))
    assert (y == 1).all()
    emulator.launch("faults", "read_global", (1,), (32,), x, y, np.int32(33))
    assert np.isnan(y).all()  # to the next 16 bytes
    for outside in (36, -1100):
        with pytest.raises(EmulationError, match=r"thread \(\d+, 0, 0\): illegal address 0x"):
            emulator.launch("faults", "read_global", (1,), (32,), x, y, np.int32(outside))
    with pytest.raises(EmulationError, match="illegal address"):
        emulator.launch("faults", "write_global", (1,), (32,), y, np.int32(32))
    with pytest.raises(EmulationError, match="illegal address 0x4"):
        emulator.launch("faults", "read_global", (1,), (32,), None, y, np.int32(1))


def test_other_faults_are_reported(emulator) -> None:
    x, y, z = np.ones(8, np.float32), emulator.empty((1,), np.float32), np.ones(1, np.int32)
    with pytest.raises(EmulationError, match="misaligned address"):
        emulator.launch("faults", "read_misaligned", (1,), (1,), emulator.upload(x), y)
    with pytest.raises(EmulationError, match="division by zero at"):
        emulator.launch("faults", "divide", (1,), (1,), z, np.int32(0))
    with pytest.raises(EmulationError, match="bytes of local memory"):
        emulator.launch("faults", "overflow_stack", (1,), (1,), z)
    emulator.launch("faults", "divide", (1,), (1,), z, np.int32(1))  # the next launch runs as if nothing had happened
    assert z == 1


def test_uploads_are_copies_and_allocations_are_undefined(emulator) -> None:
    x = np.arange(6, dtype=np.int32)[::2]
    copy = emulator.upload(x)
    assert copy.flags.c_contiguous
    copy[0] = 9
    np.testing.assert_array_equal(x, [0, 2, 4])
    assert np.isnan(emulator.empty((3, 5), types.bfloat16()).astype(np.float32)).all()
    assert emulator.empty((0, 3), np.float32).shape == (0, 3)
    assert np.isnan(emulator.empty((), np.float32))
    assert emulator.upload(1, np.float32).dtype == np.float32
