"""Convolutions from padded lines compute what the formulas say, whatever the tile, the layout and the shape."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.ops.cuda import halo
from tests import reference
from tests.emulation.emulator import Emulator
from tests.unit.kernels.test_conv2d_wgmma import Case, assert_close, draw, rounded

CASES = {
    "same": Case((2, 9, 10, 72), 40),
    "several tiles": Case((3, 11, 9, 16), 136),
    "a tile that ends with a line": Case((2, 14, 18, 8), 8),
    "wide": Case((1, 5, 150, 8), 16),
    "small images": Case((11, 3, 2, 24), 8),
    "a row": Case((2, 9, 11, 8), 16, window=(1, 3), padding=((0, 0), (1, 1))),
    "a column": Case((2, 9, 11, 8), 16, window=(3, 1), padding=((1, 1), (0, 0))),
    "five by five": Case((2, 8, 9, 136), 24, window=(5, 5), padding=((2, 2), (2, 2))),
    "seven by seven": Case((1, 12, 13, 8), 8, window=(7, 7), padding=((3, 3), (3, 3))),
    "even window": Case((2, 8, 9, 32), 8, window=(2, 4), padding=((0, 1), (2, 1))),
    "no padding": Case((2, 8, 9, 32), 8, window=(2, 4), padding=((0, 0), (0, 0))),
    "one-sided padding": Case((3, 6, 5, 8), 16, window=(4, 4), padding=((3, 0), (0, 3))),
    "window of the image's size": Case((5, 4, 3, 16), 8, window=(4, 3), padding=((0, 0), (0, 0))),
}
MORE_PADDING = Case((2, 3, 4, 16), 8, padding=((4, 5), (3, 6)))
TILES = {tile.name: tile for tile in halo.TILES}


@pytest.fixture
def hopper(device):
    """A device that has warp-group products and reads operands in one of the ways that kernels know."""
    if device.architecture != halo.ARCHITECTURE:
        pytest.skip("warp-group products need sm_90")
    return device


def chosen(hopper, dense):
    """Return a layout that the device computes right with, of dense lines or whole patterns."""
    layouts = [each for each in halo.LAYOUTS if each.dense == dense and halo.computes_right(each)]
    assert layouts, "no layout computes right on this device"
    return layouts[0]


def forward(device, random, case, compute, tile, layout, activation="relu", bias=True):
    x, x64 = draw(random, device, case.shape, compute)
    weight = random.standard_normal((case.filters, *case.window, case.shape[3])).astype(np.float32)
    shift = random.standard_normal(case.filters).astype(np.float32) if bias else None
    expected = reference.activation(reference.conv2d(x64, rounded(weight, compute), shift, **case.options), activation)
    problem = case.problem("forward", compute)
    y = device.empty(expected.shape, problem.storage)
    device_shift = device.upload(shift) if bias else None
    run = halo.candidate(problem, tile, layout).run
    run(x, device.upload(weight), device_shift, y, activation)
    assert_close(device, y, expected, compute)


def backward_input(device, random, case, compute, tile, layout):
    problem = case.problem("input", compute)
    g = problem.geometry
    grad, grad64 = draw(random, device, (g.n, g.p, g.q, g.k), compute)
    weight = random.standard_normal((g.k, g.r, g.s, g.c)).astype(np.float32)
    expected, _, _ = reference.conv2d_gradients(np.zeros(case.shape), rounded(weight, compute), grad64, **case.options)
    out = device.empty(case.shape, problem.storage)
    halo.candidate(problem, tile, layout).run(grad, device.upload(weight), None, out, None)
    assert_close(device, out, expected, compute)


@pytest.mark.parametrize("compute", ["bf16", "tf32"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "whole patterns"])
@pytest.mark.parametrize("name", [*CASES, "more padding than window"])
def test_forward(hopper, random, name, dense, compute) -> None:
    case = CASES.get(name, MORE_PADDING)
    forward(hopper, random, case, compute, TILES["256x64"], chosen(hopper, dense))


@pytest.mark.parametrize("compute", ["bf16", "tf32"])
@pytest.mark.parametrize("name", CASES)
def test_backward_input(hopper, random, name, compute) -> None:
    backward_input(hopper, random, CASES[name], compute, TILES["128x128"], chosen(hopper, True))


@pytest.mark.parametrize("compute", ["bf16", "tf32"])
@pytest.mark.parametrize("tile", TILES)
def test_all_tiles(hopper, random, tile, compute) -> None:
    layout = chosen(hopper, True)
    forward(hopper, random, CASES["several tiles"], compute, TILES[tile], layout, "leaky_relu")
    forward(hopper, random, CASES["same"], compute, TILES[tile], layout, None, bias=False)


def test_candidates_compute_what_they_are_offered_for(hopper, random) -> None:
    case = CASES["same"]
    offered = halo.candidates(case.problem("forward", "bf16"))
    assert len({candidate.name for candidate in offered}) == len(offered) == halo.OFFERED
    x, x64 = draw(random, hopper, case.shape, "bf16")
    weight = random.standard_normal((40, 3, 3, 72)).astype(np.float32)
    expected = reference.conv2d(x64, rounded(weight, "bf16"), None, **case.options)
    for candidate in offered:
        y = hopper.empty(expected.shape, x.dtype)
        candidate.run(x, hopper.upload(weight), None, y, None)
        assert_close(hopper, y, expected, "bf16")


@pytest.mark.parametrize(
    ("case", "kind", "compute"),
    [
        (Case((1, 9, 9, 12), 8), "forward", "bf16"),  # rows of 24 bytes
        (Case((1, 9, 9, 8), 12), "input", "bf16"),
        (Case((1, 9, 9, 8), 8), "weight", "bf16"),
        (Case((1, 9, 9, 8), 8), "forward", "fp32"),
        (Case((1, 9, 9, 8), 8, stride=(2, 1)), "forward", "bf16"),
        (Case((1, 9, 9, 8), 8, dilation=(1, 2)), "forward", "bf16"),
        (Case((1, 9, 9, 8), 8, window=(1, 1), padding=((0, 0), (0, 0))), "forward", "bf16"),
        (MORE_PADDING, "input", "bf16"),
        (Case((300, 1, 1, 8), 8), "forward", "bf16"),  # mostly padding
    ],
)
def test_what_other_kernels_do_is_not_offered(hopper, case, kind, compute) -> None:
    assert halo.candidates(case.problem(kind, compute)) == []


def test_a_layout_that_the_device_reads_otherwise_is_found_out(hopper) -> None:
    right = [each for each in halo.LAYOUTS if halo.computes_right(each)]
    assert halo.layout() == right[0]
    if isinstance(hopper, Emulator):  # descriptors of both kinds do not mean the same to it
        assert {each.based for each in right} == {False}


def test_nothing_is_offered_where_no_layout_computes_right(hopper, monkeypatch) -> None:
    monkeypatch.setattr(halo, "_layouts", {})
    monkeypatch.setattr(halo, "computes_right", lambda chosen: False)
    assert halo.candidates(CASES["same"].problem("forward", "bf16")) == []


def test_wide_images_are_cut_into_strips_and_narrow_ones_are_not() -> None:
    def made(width):
        problem = Case((32, width, width, 64), 64).problem("forward", "bf16")
        return halo.plan(halo.walk_of(problem), TILES["256x128"], halo.LAYOUTS[0])

    assert (made(56).pitch, made(56).strips, made(7).pitch, made(7).strips) == (57, 1, 8, 1)
    assert made(224).strips > 1
    for width in (7, 14, 28, 56, 112, 224):
        assert made(width).shared_bytes(TILES["256x128"]) <= halo.SHARED_BYTES
