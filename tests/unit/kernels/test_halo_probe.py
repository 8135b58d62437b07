"""What convolutions from padded lines rely on: copies to, and operands from, the middle of the swizzle's pattern.

The PTX ISA has the pattern begin at addresses divisible by 1024 ("Matrix Descriptor Format", base offset 0), and the
CUDA programming guide has the copy engine store by address. What kernels choose by themselves is not asserted here.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from hpcnn.ops.cuda import compile, halo, tensor_map, types
from hpcnn.ops.cuda import device as devices
from tests.emulation import build
from tests.emulation.emulator import Emulator

SOURCE = "halo_probe"
PROBE = build.HERE / "kernels" / f"{SOURCE}.cu"
LEFT_ROWS = 192


@pytest.fixture
def probe(device, monkeypatch, tmp_path):
    """A device that finds the kernels of this test."""
    if device.architecture != halo.ARCHITECTURE:
        pytest.skip("warp-group products need sm_90")
    if isinstance(device, Emulator):
        with devices.use(Emulator(folders=[PROBE.parent])) as emulator:
            yield emulator
        return
    for path in (PROBE, *build.KERNELS.glob("*.cuh")):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(compile, "folder", lambda: tmp_path)
    yield device


def stored(rows, phases):
    """Return rows of 128 bytes with chunk i of 16 bytes of each at i xor its phase."""
    chunks = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), 8, 16)
    out = np.empty_like(chunks)
    for r, phase in enumerate(phases):
        for i in range(8):
            out[r, i ^ phase % 8] = chunks[r, i]
    return out.reshape(len(rows), 128)


@pytest.mark.parametrize("pitch", [8, 16, 10, 29, 57])
@pytest.mark.parametrize("corner", [(0, 0), (-1, -1), (-2, 3)], ids=["inside", "before", "aside"])
def test_copies_of_lines_are_swizzled_by_address(probe, pitch, corner) -> None:
    height, width, lines = 5, 9, 4
    x = (np.arange(2 * height * width * 64) % 251 + 1).astype(np.float32).reshape(2, height, width, 64)
    x = x.astype(types.bfloat16())
    device_x = probe.upload(x)
    expected = np.zeros((lines, pitch, 64), x.dtype)
    for i in range(lines):
        for j in range(pitch):
            h, w = corner[0] + i, corner[1] + j
            if 0 <= h < height and 0 <= w < width:
                expected[i, j] = x[1, h, w]
    out = probe.empty((lines * pitch, 128), np.uint8)
    numbers = (np.int32(n) for n in (pitch, lines, corner[1], corner[0], 1))
    tensor = tensor_map.tiled(device_x, x.shape[::-1], (64, pitch, 1, 1))
    probe.launch(SOURCE, "copy_lines", (1,), (128,), tensor, *numbers, out, shared_bytes=lines * pitch * 128 + 1024)
    rows = expected.reshape(-1, 64)
    np.testing.assert_array_equal(probe.download(out), stored(rows, range(len(rows))))


def fragments(d):
    """Return sums (64, 128) in the order of threads and their registers."""
    thread, register = np.indices((128, 64))
    rows = thread // 32 * 16 + thread % 32 // 4 + register % 4 // 2 * 8
    columns = register // 4 * 8 + thread % 4 * 2 + register % 2
    return d[rows, columns]


@pytest.mark.parametrize("based", [0, 1], ids=["base offset 0", "base offset of the start"])
@pytest.mark.parametrize("pitch", [8, 16, 10], ids=lambda pitch: f"{pitch} rows a group")
@pytest.mark.parametrize("first", [0, 1, 2, 7, 8, 13, 22])
def test_products_from_any_row(probe, random, first, pitch, based) -> None:
    left = random.integers(-8, 9, (LEFT_ROWS, 64)).astype(types.bfloat16())
    right = random.integers(-8, 9, (128, 64)).astype(types.bfloat16())
    operand = np.array([first + m // 8 * pitch + m % 8 for m in range(64)])
    expected = fragments(left[operand].astype(np.float32) @ right.astype(np.float32).T)
    row = np.arange(LEFT_ROWS)
    readings = {  # phase of the pattern in each row
        "by address": row,
        "by address less that of the start": row - first % 8,
        "by address plus that of the start": row + first % 8,
        "from the first row of each group": (row - first) % pitch,
    }
    right_bytes = stored(right, range(128))
    fitting = []
    for name, phases in readings.items():
        operands = np.concatenate([stored(left, phases), right_bytes]).reshape(-1)
        out = probe.empty((128, 64), np.float32)
        numbers = (np.int32(n) for n in (LEFT_ROWS * 128, first, pitch * 128, based))
        args = probe.upload(operands), *numbers, out
        probe.launch(SOURCE, "products_from", (1,), (128,), *args, shared_bytes=(LEFT_ROWS + 128) * 128)
        if np.array_equal(probe.download(out), expected):
            fitting.append(name)
    wanted = "by address less that of the start" if based else "by address"
    assert wanted in fitting, f"this hardware reads the pattern {' or '.join(fitting) or 'in no way known here'}"
