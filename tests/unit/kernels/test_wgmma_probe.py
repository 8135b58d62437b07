"""Hopper's instructions one by one: where bytes lie after a copy, and what a product makes of bytes.

What is expected stands here as in the PTX ISA ("Tensors", "Asynchronous Warpgroup Level Matrix Shared Memory Layout",
"Register Fragments and Shared Memory Matrix Layouts"), apart from kernels and emulation: where one of them errs about
the hardware, the test that fails on a GPU says about what.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from hpcnn.ops.cuda import compile, tensor_map, types, wgmma
from hpcnn.ops.cuda import device as devices
from tests.emulation import build
from tests.emulation.emulator import Emulator

SOURCE = "wgmma_probe"
PROBE = build.HERE / "kernels" / f"{SOURCE}.cu"


@pytest.fixture
def probe(device, monkeypatch, tmp_path):
    """A device that finds the kernels of this test."""
    if device.architecture != wgmma.ARCHITECTURE:
        pytest.skip("warp-group products need sm_90")
    if isinstance(device, Emulator):
        with devices.use(Emulator(folders=[PROBE.parent])) as emulator:
            yield emulator
        return
    for path in (PROBE, *build.KERNELS.glob("*.cuh")):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(compile, "folder", lambda: tmp_path)
    yield device


def swizzled(rows):
    """Return rows of 128 bytes as the 128-byte swizzle stores them: chunk i of 16 bytes of row r is at i xor r % 8."""
    chunks = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), 8, 16)
    stored = np.empty_like(chunks)
    for r in range(len(rows)):
        for i in range(8):
            stored[r, i ^ r % 8] = chunks[r, i]
    return stored.reshape(len(rows), 128)


def dump(probe, tensor, coordinates, num_rows, offsets=(0, 0)):
    """Return shared memory, rows of 128 bytes, after one copy."""
    out = probe.empty((num_rows, 128), np.uint8)
    numbers = (*coordinates, *[0] * (4 - len(coordinates)), *offsets, num_rows * 128)
    rank = len(coordinates)
    probe.launch(
        *(SOURCE, "copy_dump", (1,), (128,), tensor, np.int32(rank), *map(np.int32, numbers), out),
        shared_bytes=num_rows * 128 + 1024,
    )
    return probe.download(out)


def numbered(shape, dtype):
    """Return numbers of which neighbours differ, and which bf16 and tf32 have."""
    return (np.arange(np.prod(shape)) % 251 + 1).astype(np.float32).reshape(shape).astype(dtype)


@pytest.mark.parametrize("start", [(0, 0), (64, 16), (32, 40)], ids=["inside", "behind columns", "behind rows"])
def test_tiled_copy_of_a_matrix(probe, start) -> None:
    x = numbered((50, 96), types.bfloat16())
    device_x = probe.upload(x)
    expected = np.zeros((16, 64), x.dtype)
    part = x[start[1] : start[1] + 16, start[0] : start[0] + 64]
    expected[: part.shape[0], : part.shape[1]] = part
    copied = dump(probe, tensor_map.tiled(device_x, (96, 50), (64, 16)), start, 16)
    np.testing.assert_array_equal(copied, swizzled(expected))


def test_tiled_copy_of_one_tap_of_filters(probe) -> None:
    x = numbered((20, 9, 72), types.bfloat16())
    device_x = probe.upload(x)
    expected = np.zeros((32, 64), x.dtype)
    expected[:12, :8] = x[8:20, 5, 64:]
    copied = dump(probe, tensor_map.tiled(device_x, (72, 9, 20), (64, 1, 32)), (64, 5, 8), 32)
    np.testing.assert_array_equal(copied, swizzled(expected))


IM2COL = {
    # padding before (top, left), grid of base pixels, stride, offset of the tap (h, w), first channel, first pixel
    "one pixel after the other": ((0, 0), (6, 7), (1, 1), (0, 0), 0, 0),
    "from the middle of a line": ((0, 0), (6, 7), (1, 1), (0, 0), 0, 12),
    "a box of fewer pixels": ((0, 0), (4, 6), (1, 1), (0, 0), 0, 0),
    "offset": ((0, 0), (4, 6), (1, 1), (2, 1), 0, 0),
    "padding": ((1, 2), (7, 10), (1, 1), (0, 0), 0, 0),
    "padding and offset": ((1, 2), (6, 7), (1, 1), (2, 4), 0, 3),
    "stride": ((0, 0), (3, 3), (2, 3), (0, 0), 0, 1),
    "stride that leaves a rest": ((1, 0), (3, 2), (2, 3), (1, 2), 0, 0),
    "channels behind the last": ((1, 1), (6, 7), (1, 1), (1, 1), 64, 0),
    "images behind the last": ((1, 1), (6, 7), (1, 1), (1, 1), 0, 100),
}


@pytest.mark.parametrize("name", IM2COL)
@pytest.mark.parametrize("compute", ["bf16", "tf32"])
def test_im2col_copy(probe, name, compute) -> None:
    before, grid, stride, offset, channel, first = IM2COL[name]
    x = numbered((3, 6, 7, 80), types.bfloat16() if compute == "bf16" else np.float32)
    device_x = probe.upload(x)
    width = 128 // x.dtype.itemsize
    expected = np.zeros((64, width), x.dtype)
    for row in range(64):
        n, rest = divmod(first + row, grid[0] * grid[1])
        i, j = divmod(rest, grid[1])
        h, w = i * stride[0] - before[0] + offset[0], j * stride[1] - before[1] + offset[1]
        if n < 3 and 0 <= h < 6 and 0 <= w < 7:
            part = x[n, h, w, channel : channel + width]
            expected[row, : len(part)] = part
    corner = (-before[0], -before[1])
    upper = tuple(corner[i] + (grid[i] - 1) * stride[i] - (x.shape[1 + i] - 1) for i in (0, 1))
    tensor = tensor_map.im2col(device_x, 64, corner, upper, stride)
    n, rest = divmod(first, grid[0] * grid[1])
    i, j = divmod(rest, grid[1])
    start = (channel, corner[1] + j * stride[1], corner[0] + i * stride[0], n)
    copied = dump(probe, tensor, start, 64, offset[::-1])
    np.testing.assert_array_equal(copied, swizzled(expected))


def test_copies_as_tf32_round_or_leave_numbers_as_they_are(probe, random) -> None:
    x = random.standard_normal((16, 32)).astype(np.float32)
    device_x = probe.upload(x)
    copied = dump(probe, tensor_map.tiled(device_x, (32, 16), (32, 16)), (0, 0), 16)
    plain = np.ascontiguousarray(swizzled(copied)).view(np.float32)  # the swizzle is its own inverse
    np.testing.assert_allclose(plain, x, rtol=2**-11)


def test_barriers_let_two_warps_take_turns(probe) -> None:
    out = probe.empty((1,), np.int32)
    probe.launch(SOURCE, "barrier_turns", (1,), (64,), np.int32(7), out, shared_bytes=1024)
    value = 0
    for _ in range(7):
        for warp in (0, 1):
            value = value * 2 % 1009 + warp + 1
    assert probe.download(out)[0] == value


def fragments(d):
    """Return sums (64, 128) in the order of threads and their registers."""
    thread, register = np.indices((128, 64))
    rows = thread // 32 * 16 + thread % 32 // 4 + register % 4 // 2 * 8
    columns = register // 4 * 8 + thread % 4 * 2 + register % 2
    return d[rows, columns]


def multiply(probe, kernel, operands):
    out = probe.empty((128, 64), np.float32)
    probe.launch(SOURCE, kernel, (1,), (128,), probe.upload(operands), out, shared_bytes=24576)
    return probe.download(out)


@pytest.mark.parametrize("kernel", ["products_bf16", "products_tf32"])
def test_products_of_rows_along_the_sum(probe, random, kernel) -> None:
    dtype, depth = (types.bfloat16(), 64) if kernel.endswith("bf16") else (np.float32, 32)
    a, b = (random.integers(-8, 9, (rows, depth)).astype(dtype) for rows in (64, 128))
    operands = np.concatenate([swizzled(a), swizzled(b)]).reshape(-1)
    expected = a.astype(np.float32) @ b.astype(np.float32).T
    np.testing.assert_array_equal(multiply(probe, kernel, operands), fragments(expected))


def test_products_of_rows_across_the_sum(probe, random) -> None:
    a, b = (random.integers(-8, 9, (64, columns)).astype(types.bfloat16()) for columns in (64, 128))
    operands = np.concatenate([swizzled(part) for part in (a, b[:, :64], b[:, 64:])]).reshape(-1)
    expected = a.astype(np.float32).T @ b.astype(np.float32)
    np.testing.assert_array_equal(multiply(probe, "products_transposed_bf16", operands), fragments(expected))


def test_blocks_of_a_cluster_know_their_rank_and_arrive_at_each_other_s_barriers(probe) -> None:
    out = probe.empty((8, 2), np.int32)
    probe.launch(SOURCE, "cluster_turns", (8,), (32,), np.int32(7), out, shared_bytes=64)
    np.testing.assert_array_equal(probe.download(out), [(block % 4, 7) for block in range(8)])


MASKS = {
    "to all": (15, 15, 15, 15),
    "each to itself": (1, 2, 4, 8),
    "to those beside": (3, 3, 12, 12),
    "to those below": (5, 10, 5, 10),
}


def multicast(probe, tensor, coordinates, masks, offsets=(0, 0)):
    """Return slots of 16 rows of 128 bytes, (block, rank of the sender, row), after a copy by each block."""
    ended, out = probe.empty((4,), np.int32), probe.empty((4, 4, 16, 128), np.uint8)
    ranks = sum(mask << 4 * rank for rank, mask in enumerate(masks))
    numbers = (*coordinates, *[0] * (4 - len(coordinates)), *offsets, ranks, 16 * 128)
    probe.launch(
        *(SOURCE, "multicast_dump", (4,), (128,), tensor, np.int32(len(coordinates)), *map(np.int32, numbers)),
        *(ended, out),
        shared_bytes=4 * 16 * 128 + 1024,
    )
    assert probe.download(ended).tolist() == [1, 1, 1, 1], "a barrier did not count the bytes"
    return probe.download(out)


def received(boxes, masks):
    """Return what `multicast` should, of the box that each block copies."""
    slots = np.full((4, 4, 16, 128), 0xEE, np.uint8)
    for sender, mask in enumerate(masks):
        for block in range(4):
            if mask >> block & 1:
                slots[block, sender] = swizzled(boxes[sender])
    return slots


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_multicast_of_a_matrix(probe, masks) -> None:
    x = numbered((64, 64), types.bfloat16())
    device_x = probe.upload(x)
    copied = multicast(probe, tensor_map.tiled(device_x, (64, 64), (64, 16)), (0, 0), masks)
    np.testing.assert_array_equal(copied, received(x.reshape(4, 16, 64), masks))


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_multicast_of_one_tap_of_filters(probe, masks) -> None:
    x = numbered((64, 3, 64), types.bfloat16())
    device_x = probe.upload(x)
    copied = multicast(probe, tensor_map.tiled(device_x, (64, 3, 64), (64, 1, 16)), (0, 2, 0), masks)
    np.testing.assert_array_equal(copied, received(x[:, 2].reshape(4, 16, 64), masks))


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_im2col_multicast(probe, masks) -> None:
    x = numbered((4, 6, 7, 64), types.bfloat16())
    device_x = probe.upload(x)
    tensor = tensor_map.im2col(device_x, 16, (-1, -1), (-1, -1), (1, 1))
    copied = multicast(probe, tensor, (0, -1, -1, 0), masks, offsets=(2, 1))  # the tap (h, w) = (1, 2)
    boxes = np.zeros((4, 16, 64), x.dtype)
    for n in range(4):
        for row in range(16):
            i, j = divmod(row, 7)
            h, w = i - 1 + 1, j - 1 + 2
            if 0 <= h < 6 and 0 <= w < 7:
                boxes[n, row] = x[n, h, w]
    np.testing.assert_array_equal(copied, received(boxes, masks))
