"""Convolutions by warp groups compute what the formulas say, whatever the tile, the split and the shape."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import pytest

from hpcnn.ops.cuda import types, wgmma, wgmma_tiles
from hpcnn.ops.cuda.products import Geometry, Problem
from tests import reference


@dataclass(frozen=True)
class Case:
    """A convolution; x is (n, h, w, c)."""

    shape: tuple[int, int, int, int]
    filters: int
    window: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)

    @property
    def options(self) -> dict:
        """As the reference takes them."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def problem(self, kind: str, compute: str) -> Problem:
        """Return a pass of it."""
        n, h, w, c = self.shape
        p, q = reference.output_size((h, w), self.window, **self.options)
        before = (self.padding[0][0], self.padding[1][0])
        return Problem(
            kind,
            compute,
            Geometry(n, h, w, c, self.filters, *self.window, p, q, *self.stride, *before, *self.dilation, 1),
        )


CASES = {
    "same": Case((2, 9, 10, 72), 40),
    "several tiles": Case((3, 11, 9, 16), 136),
    "pointwise": Case((5, 7, 6, 128), 24, window=(1, 1), padding=((0, 0), (0, 0))),
    "pointwise with strides": Case((2, 9, 8, 24), 16, window=(1, 1), padding=((0, 0), (0, 0)), stride=(2, 2)),
    "strides that leave a rest": Case((2, 10, 13, 16), 24, stride=(2, 3), padding=((1, 0), (2, 1))),
    "a stem": Case((1, 14, 15, 8), 16, window=(7, 5), stride=(2, 2), padding=((3, 3), (2, 2))),
    "dilation": Case((2, 12, 11, 8), 16, window=(3, 2), dilation=(2, 3), padding=((2, 1), (0, 3))),
    "more padding than window": Case((2, 3, 4, 16), 8, padding=((4, 5), (3, 6))),
    "no padding": Case((1, 8, 9, 32), 8, window=(2, 4), padding=((0, 0), (0, 0))),
    "fully connected": Case((150, 1, 1, 264), 48, window=(1, 1), padding=((0, 0), (0, 0))),
}
PIXEL_TILES = {tile.name: tile for tile in wgmma_tiles.PIXEL_TILES}
WEIGHT_TILES = {tile.name: tile for tile in wgmma_tiles.WEIGHT_TILES}


@pytest.fixture
def hopper(device):
    """A device that has warp-group products."""
    if device.architecture != wgmma.ARCHITECTURE:
        pytest.skip("warp-group products need sm_90")
    return device


def draw(random, device, shape, compute):
    """Return numbers on the device, and the same, as it has them, in float64."""
    x = random.standard_normal(shape).astype(np.float32)
    if compute == "bf16":
        x = x.astype(types.bfloat16())
    return device.upload(x), x.astype(np.float64)


def rounded(weight, compute):
    """Return filters as the products see them."""
    return weight.astype(types.bfloat16()).astype(np.float64) if compute == "bf16" else weight.astype(np.float64)


def tolerance(compute, out_dtype):
    """Relative error of a norm: of the output's rounding, and of factors of 10 bits for tf32."""
    if compute == "tf32":
        return 1e-3
    return 4e-3 if out_dtype != np.float32 else 2e-5


def assert_close(device, actual, expected, compute):
    error = device.download(actual).astype(np.float64) - expected
    assert np.isfinite(error).all()
    assert np.linalg.norm(error) <= tolerance(compute, actual.dtype) * np.linalg.norm(expected)
    assert np.abs(error).max() <= 20 * tolerance(compute, actual.dtype) * np.sqrt(np.mean(expected**2))


def forced(problem, tile, splits):
    """Return a candidate of this tile and split, whatever the order of preference."""
    assert wgmma.candidates(problem)
    return wgmma.candidate(problem, tile, splits).run


def forward(device, random, case, compute, tile, splits=1, activation="relu", bias=True):
    x, x64 = draw(random, device, case.shape, compute)
    weight = random.standard_normal((case.filters, *case.window, case.shape[3])).astype(np.float32)
    shift = random.standard_normal(case.filters).astype(np.float32) if bias else None
    expected = reference.activation(reference.conv2d(x64, rounded(weight, compute), shift, **case.options), activation)
    problem = case.problem("forward", compute)
    y = device.empty(expected.shape, problem.storage)
    device_shift = device.upload(shift) if bias else None
    forced(problem, tile, splits)(x, device.upload(weight), device_shift, y, activation)
    assert_close(device, y, expected, compute)


def backward_input(device, random, case, compute, tile, splits=1):
    problem = case.problem("input", compute)
    g = problem.geometry
    grad, grad64 = draw(random, device, (g.n, g.p, g.q, g.k), compute)
    weight = random.standard_normal((g.k, g.r, g.s, g.c)).astype(np.float32)
    expected, _, _ = reference.conv2d_gradients(np.zeros(case.shape), rounded(weight, compute), grad64, **case.options)
    out = device.empty(case.shape, problem.storage)
    forced(problem, tile, splits)(grad, device.upload(weight), None, out, None)
    assert_close(device, out, expected, compute)


def backward_weight(device, random, case, tile, splits=1):
    problem = case.problem("weight", "bf16")
    g = problem.geometry
    x, x64 = draw(random, device, case.shape, "bf16")
    grad, grad64 = draw(random, device, (g.n, g.p, g.q, g.k), "bf16")
    shape = (g.k, g.r, g.s, g.c)
    _, expected, _ = reference.conv2d_gradients(x64, np.zeros(shape), grad64, **case.options)
    out = device.empty(shape, np.float32)
    forced(problem, tile, splits)(x, grad, out)
    assert_close(device, out, expected, "bf16")


@pytest.mark.parametrize("compute", ["bf16", "tf32"])
@pytest.mark.parametrize("name", CASES)
def test_forward(hopper, random, name, compute) -> None:
    forward(hopper, random, CASES[name], compute, PIXEL_TILES["128x128"])


@pytest.mark.parametrize("compute", ["bf16", "tf32"])
@pytest.mark.parametrize("name", CASES)
def test_backward_input(hopper, random, name, compute) -> None:
    backward_input(hopper, random, CASES[name], compute, PIXEL_TILES["128x64"])


@pytest.mark.parametrize("name", CASES)
def test_backward_weight(hopper, random, name) -> None:
    backward_weight(hopper, random, CASES[name], WEIGHT_TILES["128x128"])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("compute", ["bf16", "tf32"])
@pytest.mark.parametrize("tile", [tile.name for tile in wgmma_tiles.PIXEL_TILES if tile.plain])
def test_forward_of_all_tiles_and_splits(hopper, random, tile, compute, splits) -> None:
    forward(hopper, random, CASES["several tiles"], compute, PIXEL_TILES[tile], splits, "leaky_relu")


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("tile", WEIGHT_TILES)
def test_backward_weight_of_all_tiles_and_splits(hopper, random, tile, splits) -> None:
    backward_weight(hopper, random, CASES["several tiles"], WEIGHT_TILES[tile], splits)


def shared_out(tiles: Iterable[str], names: Iterable[str], each: int) -> list[tuple[str, str]]:
    """Return tiles with `each` of the cases, in turn: every tile in every case would take minutes of emulation."""
    turns = cycle(names)
    return [(tile, next(turns)) for tile in tiles for _ in range(each)]


# Several tiles for each cluster and each group, and clusters of which some blocks are behind the last row or column.
SHARED = {
    "rows behind the last": Case((3, 25, 24, 64), 72, window=(1, 3), padding=((0, 0), (1, 1))),
    "columns behind the last": Case((2, 15, 14, 136), 328, window=(1, 2), padding=((0, 0), (1, 0))),
    "less than one tile": Case((1, 5, 6, 8), 8),
    "more steps than stages": Case((2, 12, 12, 200), 80),
}
SHARED_PIXELS = [tile.name for tile in wgmma_tiles.PIXEL_TILES if not tile.plain]
SHARED_WEIGHTS = [tile.name for tile in wgmma_tiles.WEIGHT_TILES if not tile.plain]


@pytest.mark.parametrize(("tile", "name"), shared_out(SHARED_PIXELS, SHARED, 2))
def test_forward_by_clusters_and_alternating_groups(hopper, random, tile, name) -> None:
    forward(hopper, random, SHARED[name], "bf16", PIXEL_TILES[tile])


@pytest.mark.parametrize("tile", [tile.name for tile in wgmma_tiles.PIXEL_TILES if tile.engine])
def test_outputs_that_the_copy_engine_cannot_store(hopper, random, tile) -> None:
    forward(hopper, random, Case((2, 9, 10, 16), 36), "bf16", PIXEL_TILES[tile])  # rows of 72 bytes


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_activations_of_what_the_copy_engine_stores(hopper, random, activation, bias) -> None:
    forward(hopper, random, CASES["same"], "bf16", PIXEL_TILES["128x128as"], activation=activation, bias=bias)


@pytest.mark.parametrize(
    ("tile", "name"),
    shared_out(SHARED_PIXELS, ["strides that leave a rest", "dilation", "more padding than window"], 1),
)
def test_backward_input_by_clusters_and_alternating_groups(hopper, random, tile, name) -> None:
    backward_input(hopper, random, CASES[name], "bf16", PIXEL_TILES[tile])


@pytest.mark.parametrize(("tile", "name"), shared_out(SHARED_WEIGHTS, SHARED, 2))
def test_backward_weight_by_clusters_and_alternating_groups(hopper, random, tile, name) -> None:
    backward_weight(hopper, random, SHARED[name], WEIGHT_TILES[tile])


def even_gradient(device, problem, tile, x, grad):
    """Return a weight gradient in equal shares, NaN wherever nothing is stored."""
    g = problem.geometry
    out = device.upload(np.full((g.k, g.r, g.s, g.c), np.nan, np.float32))
    wgmma.even_candidate(problem, tile).run(x, grad, out)
    return out


def backward_weight_evenly(device, random, case, tile):
    """Compare with the reference, and twice with each other to the bit."""
    problem = case.problem("weight", "bf16")
    g = problem.geometry
    x, x64 = draw(random, device, case.shape, "bf16")
    grad, grad64 = draw(random, device, (g.n, g.p, g.q, g.k), "bf16")
    _, expected, _ = reference.conv2d_gradients(x64, np.zeros((g.k, g.r, g.s, g.c)), grad64, **case.options)
    out = even_gradient(device, problem, tile, x, grad)
    assert_close(device, out, expected, "bf16")
    again = even_gradient(device, problem, tile, x, grad)
    np.testing.assert_array_equal(device.download(out), device.download(again))


EVEN_TILES = {tile.name: tile for tile in wgmma_tiles.EVEN_TILES}


@pytest.mark.parametrize("name", CASES)
def test_backward_weight_in_equal_shares(hopper, random, name) -> None:
    backward_weight_evenly(hopper, random, CASES[name], EVEN_TILES["128x128"])


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("tile", EVEN_TILES)
def test_backward_weight_in_equal_shares_of_all_tiles(hopper, random, tile, name) -> None:
    backward_weight_evenly(hopper, random, SHARED[name], EVEN_TILES[tile])


@pytest.mark.parametrize("clusters", [1, 2, 3, 5, 7, 16, 31])
@pytest.mark.parametrize("tile", ["128x128", "128x256_2x1", "256x128_1x2"])
def test_equal_shares_of_any_number(hopper, random, monkeypatch, tile, clusters) -> None:
    """Clusters with parts of a tile, with several tiles, and with both; 34 steps a tile."""
    monkeypatch.setattr(wgmma_tiles, "clusters", lambda _: clusters)
    monkeypatch.setattr(wgmma_tiles, "EVEN_MIN_STEPS", 1)
    backward_weight_evenly(
        hopper, random, Case((3, 27, 26, 136), 264, (1, 2), padding=((0, 0), (1, 0))), EVEN_TILES[tile]
    )


@pytest.mark.parametrize("clusters", [9, 17, 40, 66])
def test_many_partial_sums_of_one_tile(hopper, random, monkeypatch, clusters) -> None:
    """Threads share the sums of a place, not all of them equally many."""
    monkeypatch.setattr(wgmma_tiles, "clusters", lambda _: clusters)
    monkeypatch.setattr(wgmma_tiles, "EVEN_MIN_STEPS", 1)
    case = Case((3, 40, 37, 72), 72, (1, 1), padding=((0, 0), (0, 0)))
    backward_weight_evenly(hopper, random, case, EVEN_TILES["128x128"])


def test_equal_shares_of_gradients_that_begin_anywhere(hopper, random) -> None:
    case = CASES["several tiles"]
    problem = case.problem("weight", "bf16")
    g = problem.geometry
    x, _ = draw(random, hopper, case.shape, "bf16")
    grad, _ = draw(random, hopper, (g.n, g.p, g.q, g.k), "bf16")
    expected = hopper.download(even_gradient(hopper, problem, EVEN_TILES["128x128"], x, grad))
    flat = hopper.upload(np.full(expected.size + 2, np.nan, np.float32))
    view = flat[1:-1].reshape(expected.shape)
    wgmma.even_candidate(problem, EVEN_TILES["128x128"]).run(x, grad, view)
    np.testing.assert_array_equal(hopper.download(view), expected)
    assert np.isnan(hopper.download(flat)[[0, -1]]).all()


@pytest.mark.parametrize(
    ("tiles", "steps", "clusters", "cuts"),
    [(16, 196, 132, True), (72, 784, 66, True), (264, 49, 132, False), (3, 33, 1, False), (200, 1, 132, False)],
)
def test_partial_sums_are_expected_where_cuts_go_through_tiles(tiles, steps, clusters, cuts) -> None:
    assert wgmma_tiles.Cut(1, tiles, steps, clusters).cuts_tiles is cuts


def test_rows_of_steps_that_32_bits_cannot_count_are_not_cut(hopper) -> None:
    assert wgmma_tiles.even_plans((4096, 4096), 2**10)
    assert wgmma_tiles.even_plans((2**14, 2**14), 2**20) == []


def test_names_of_tiles_differ() -> None:
    for tiles in (wgmma_tiles.PIXEL_TILES, wgmma_tiles.WEIGHT_TILES, wgmma_tiles.EVEN_TILES):
        assert len({tile.name for tile in tiles}) == len(tiles)


def test_candidates_are_few_and_compute_what_they_are_offered_for(hopper, random) -> None:
    problem = CASES["same"].problem("forward", "bf16")
    offered = wgmma.candidates(problem)
    assert 1 <= len(offered) <= wgmma_tiles.OFFERED
    assert len({candidate.name for candidate in offered}) == len(offered)
    x, x64 = draw(random, hopper, CASES["same"].shape, "bf16")
    weight = random.standard_normal((40, 3, 3, 72)).astype(np.float32)
    expected = reference.conv2d(x64, rounded(weight, "bf16"), None, **CASES["same"].options)
    for candidate in offered:
        y = hopper.empty(expected.shape, x.dtype)
        candidate.run(x, hopper.upload(weight), None, y, None)
        assert_close(hopper, y, expected, "bf16")


@pytest.mark.parametrize(
    ("case", "kind", "compute"),
    [
        (Case((1, 9, 9, 12), 8), "forward", "bf16"),  # rows of 24 bytes
        (Case((1, 9, 9, 6), 8), "forward", "tf32"),
        (Case((1, 9, 9, 8), 12), "input", "bf16"),
        (Case((1, 9, 9, 8), 12), "weight", "bf16"),
        (Case((1, 9, 9, 8), 8), "weight", "tf32"),
        (Case((1, 9, 9, 8), 8), "forward", "fp32"),
        (Case((1, 400, 9, 8), 8, window=(1, 3), padding=((200, 0), (0, 0))), "forward", "bf16"),  # corner at -200
        (Case((1, 300, 9, 8), 8, dilation=(130, 1)), "forward", "bf16"),  # a tap 260 rows away
        (Case((1, 20, 20, 8), 8, stride=(2, 2), dilation=(2, 2)), "input", "bf16"),
    ],
)
def test_what_the_copy_engine_cannot_do_is_not_offered(hopper, case, kind, compute) -> None:
    assert wgmma.candidates(case.problem(kind, compute)) == []


def test_nothing_is_offered_to_other_devices(hopper, monkeypatch) -> None:
    monkeypatch.setattr(hopper, "architecture", 80)
    assert wgmma.candidates(CASES["same"].problem("forward", "bf16")) == []
