"""Fragments of matrices are laid out as the PTX ISA says, and asynchronous copies arrive no sooner than waited for.

The maps from (lane, register) to (row, column) stand here as in the figures of the PTX ISA, sections "Matrix multiply-
accumulate operation using mma instruction" (m16n8k16 and m16n8k8) and "ldmatrix", apart from the emulation's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcnn.ops.cuda import types
from tests.emulation import build
from tests.emulation.emulator import EmulationError, Emulator

GROUP, IN_GROUP = np.divmod(np.arange(32), 4)


@pytest.fixture
def emulator():
    if build.COMPILER is None:
        pytest.skip("the emulation of kernels needs g++")
    return Emulator(folders=[Path(build.HERE) / "kernels"])


def registers(elements) -> np.ndarray:
    """Return pairs of bfloat16 as the registers that hold them, the first one in the lower half."""
    bits = np.ascontiguousarray(elements).view(np.uint16).astype(np.uint32)
    return np.ascontiguousarray(bits[..., 0] | bits[..., 1] << 16)


def accumulators(d) -> np.ndarray:
    """Return the four registers of each lane of a 16 x 8 sum."""
    rows = np.stack([GROUP, GROUP, GROUP + 8, GROUP + 8], axis=1)
    columns = np.stack([2 * IN_GROUP, 2 * IN_GROUP + 1] * 2, axis=1)
    return np.ascontiguousarray(d[rows, columns])


def test_ldmatrix(emulator) -> None:
    x = np.arange(256, dtype=np.uint16) * 3
    straight, transposed = emulator.empty((32, 4), np.uint32), emulator.empty((32, 4), np.uint32)
    emulator.launch("fragments", "fragments", (1,), (32,), emulator.upload(x), straight, transposed, shared_bytes=512)
    matrices = x.reshape(4, 8, 8).astype(np.uint32)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        pairs = matrices[:, row, column] | matrices[:, row, column + 1] << 16
        np.testing.assert_array_equal(straight[lane], pairs)
        pairs = matrices[:, column, row] | matrices[:, column + 1, row] << 16
        np.testing.assert_array_equal(transposed[lane], pairs)


def test_mma_bf16(emulator, random) -> None:
    a, b = (random.standard_normal(shape).astype(types.bfloat16()) for shape in ((16, 16), (16, 8)))
    c = random.standard_normal((16, 8)).astype(np.float32)
    first, second = 2 * IN_GROUP, 2 * IN_GROUP + 8
    pairs = [a[row[:, None], column[:, None] + [0, 1]] for column in (first, second) for row in (GROUP, GROUP + 8)]
    left = registers(np.stack(pairs, axis=1))
    right = registers(np.stack([b[row[:, None] + [0, 1], GROUP[:, None]] for row in (first, second)], axis=1))
    d = emulator.upload(accumulators(c))
    emulator.launch("fragments", "multiply_bf16", (1,), (32,), left, right, d, np.int32(3))
    expected = c + 3 * (a.astype(np.float64) @ b.astype(np.float64))
    np.testing.assert_allclose(d, accumulators(expected), rtol=1e-5, atol=1e-5)


def test_mma_tf32_reads_19_bits(emulator, random) -> None:
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    c = random.standard_normal((16, 8)).astype(np.float32)
    corners = [(row, column) for column in (IN_GROUP, IN_GROUP + 4) for row in (GROUP, GROUP + 8)]
    left = np.stack([a[row, column] for row, column in corners], axis=1).view(np.uint32)
    right = np.stack([b[row, GROUP] for row in (IN_GROUP, IN_GROUP + 4)], axis=1).view(np.uint32)
    d = emulator.upload(accumulators(c))
    emulator.launch("fragments", "multiply_tf32", (1,), (32,), left, right, d)
    a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b))
    np.testing.assert_allclose(d, accumulators(c + a @ b), rtol=1e-6, atol=1e-6)


def test_tf32_rounds_to_the_nearest(emulator) -> None:
    step = 2.0**-10
    x = np.array([1, 1 + step, 1 + 0.49 * step, 1 + 0.51 * step, 1 + 0.5 * step, -1 - 1.5 * step], np.float32)
    y = emulator.empty(x.shape, np.uint32)
    emulator.launch("fragments", "round_tf32", (1,), x.shape, x, y)
    expected = np.array([1, 1 + step, 1, 1 + step, 1 + step, -1 - 2 * step], np.float32)
    np.testing.assert_array_equal(y.view(np.float32), expected)


def test_copies_arrive_when_waited_for(emulator, random) -> None:
    x = emulator.upload(random.standard_normal(1000).astype(np.float32))
    expected = np.pad(x, (0, 24))
    for _ in range(4):
        y = emulator.empty((1024,), np.float32)
        emulator.launch("fragments", "stream_waiting", (1,), (32,), x, y, np.int32(1000))
        np.testing.assert_array_equal(y, expected)
        emulator.launch("fragments", "stream_too_early", (1,), (32,), x, y, np.int32(1000))
        assert np.isnan(y).any()
    y = emulator.empty((32,), np.float32)
    emulator.launch("fragments", "copy_words", (1,), (32,), x, y)
    np.testing.assert_array_equal(y, np.where(np.arange(32) % 2, x[:32], 0))


def test_copies_are_aligned(emulator) -> None:
    with pytest.raises(EmulationError, match=r"asynchronous copy from .* not 16-byte aligned"):
        emulator.launch("fragments", "copy_misaligned", (1,), (1,), *(emulator.empty((8,), np.float32) for _ in "xy"))
