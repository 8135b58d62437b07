"""Input gradients of convolutions with strides in one launch: what the formulas say, in every tile and phase."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.ops.cuda import wgmma, wgmma_tiles
from tests import reference
from tests.unit.kernels.test_conv2d_wgmma import Case, assert_close, draw, hopper, rounded

__all__ = ["hopper"]  # a fixture

POINT = {"window": (1, 1), "padding": ((0, 0), (0, 0))}
CASES = {
    "a window": Case((2, 9, 10, 72), 40, stride=(2, 2)),
    "uneven padding": Case((3, 13, 12, 136), 200, stride=(2, 2), padding=((0, 2), (2, 1))),
    "padding on one side": Case((2, 8, 7, 24), 16, stride=(2, 2), padding=((0, 1), (0, 1))),
    "a stem": Case((1, 14, 15, 3), 16, window=(7, 5), stride=(2, 2), padding=((3, 3), (2, 2))),
    "pointwise": Case((3, 9, 12, 72), 136, stride=(2, 2), **POINT),
    "pointwise, many channels": Case((2, 6, 5, 328), 24, stride=(2, 2), **POINT),
    "pointwise, padded": Case((2, 7, 8, 24), 16, window=(1, 1), stride=(2, 2), padding=((1, 1), (1, 0))),
    "channels that fill no vectors": Case((2, 7, 9, 13), 8, window=(1, 2), stride=(2, 2), padding=((0, 0), (0, 1))),
    "rows of 72 bytes": Case((2, 7, 6, 36), 24, window=(1, 1), stride=(2, 2), padding=((0, 0), (0, 0))),
    "strides of rows only": Case((2, 9, 10, 16), 24, stride=(2, 1)),
    "four phases of columns": Case((2, 5, 14, 16), 24, window=(2, 3), stride=(1, 4), padding=((1, 0), (0, 2))),
    "three phases of rows": Case((2, 11, 5, 16), 24, window=(4, 1), stride=(3, 1), padding=((2, 1), (0, 0))),
    "strides beyond the window": Case((2, 9, 9, 16), 8, window=(1, 2), stride=(2, 2), padding=((0, 0), (1, 0))),
    "no pixel is reached": Case((2, 2, 3, 16), 8, window=(1, 1), stride=(3, 1), padding=((1, 0), (0, 0))),
    "images of one line": Case((5, 1, 9, 40), 72, window=(1, 3), stride=(1, 2), padding=((0, 0), (1, 1))),
}
TILES = [tile.name for tile in wgmma_tiles.PHASE_TILES]


def backward_input(device, random, case, compute, tile) -> None:
    problem = case.problem("input", compute)
    g = problem.geometry
    grad, grad64 = draw(random, device, (g.n, g.p, g.q, g.k), compute)
    weight = random.standard_normal((g.k, g.r, g.s, g.c)).astype(np.float32)
    expected, _, _ = reference.conv2d_gradients(np.zeros(case.shape), rounded(weight, compute), grad64, **case.options)
    offered = {candidate.name: candidate for candidate in wgmma.candidates(problem)}
    out = device.upload(np.full(case.shape, np.nan, problem.storage))
    offered[f"wgmma_phases_{tile}"].run(grad, device.upload(weight), None, out, None)
    assert_close(device, out, expected, compute)


@pytest.mark.parametrize("compute", ["bf16", "tf32"])
@pytest.mark.parametrize("name", CASES)
def test_all_phases_in_one_launch(hopper, random, name, compute) -> None:
    backward_input(hopper, random, CASES[name], compute, "128x64")


@pytest.mark.parametrize("name", CASES)
def test_alternating_groups(hopper, random, name) -> None:
    backward_input(hopper, random, CASES[name], "bf16", "128x128a")


@pytest.mark.parametrize("compute", ["bf16", "tf32"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", ["uneven padding", "pointwise, many channels"])
def test_all_tiles(hopper, random, name, tile, compute) -> None:
    backward_input(hopper, random, CASES[name], compute, tile)


@pytest.mark.parametrize(("processors", "compute"), [(1, "bf16"), (3, "bf16"), (3, "tf32")])
@pytest.mark.parametrize("tile", ["128x64", "128x128a", "256x64a"])
@pytest.mark.parametrize("name", ["a window", "uneven padding", "pointwise"])
def test_blocks_that_take_tiles_of_several_phases(hopper, random, monkeypatch, name, tile, processors, compute) -> None:
    monkeypatch.setattr(hopper, "num_processors", processors)
    backward_input(hopper, random, CASES[name], compute, tile)


def test_bias_and_activation(hopper, random) -> None:
    case = CASES["pointwise"]
    problem = case.problem("input", "bf16")
    g = problem.geometry
    grad, grad64 = draw(random, hopper, (g.n, g.p, g.q, g.k), "bf16")
    weight = random.standard_normal((g.k, g.r, g.s, g.c)).astype(np.float32)
    bias = random.standard_normal(g.c).astype(np.float32)
    sums, _, _ = reference.conv2d_gradients(np.zeros(case.shape), rounded(weight, "bf16"), grad64, **case.options)
    out = hopper.empty(case.shape, problem.storage)
    tile = wgmma_tiles.PHASE_TILES[0]
    wgmma.phased(problem, tile).run(grad, hopper.upload(weight), hopper.upload(bias), out, "relu")
    assert_close(hopper, out, reference.activation(sums + bias, "relu"), "bf16")


def test_offered_for_two_to_four_phases_only(hopper) -> None:
    def names(case, kind="input"):
        return [candidate.name for candidate in wgmma.candidates(case.problem(kind, "bf16"))]

    assert names(CASES["a window"])[0].startswith("wgmma_phases_")
    assert any(not name.startswith("wgmma_phases_") for name in names(CASES["a window"]))
    for case, kind in (
        (CASES["a window"], "forward"),
        (Case((2, 9, 10, 16), 8), "input"),
        (Case((2, 9, 10, 16), 8, stride=(2, 3)), "input"),
    ):
        assert names(case, kind)
        assert not any(name.startswith("wgmma_phases_") for name in names(case, kind))
