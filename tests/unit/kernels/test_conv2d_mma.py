"""Convolutions on tensor cores: every tile, every pass, against the float64 loops on inputs rounded alike.

Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns.
"""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest

from hpcnn.geometry import output_size
from hpcnn.ops.cuda import mma, products, types
from tests import reference

TOLERANCE = {("bf16", True): 4e-3, ("bf16", False): 1e-5, ("tf32", True): 1e-5, ("tf32", False): 1e-5}
"""Relative error of images and of filters: bf16 images are rounded to 8 bits, all else is summed in float32."""

# N, H, W, C, K, (R, S), stride, padding, dilation
PLAIN = (2, 9, 11, 24, 40, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
CASES = {
    "3x3": PLAIN,
    "1x1": (1, 9, 9, 40, 72, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "1x1 stride 2": (2, 7, 8, 16, 8, (1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    "5x5 C=3": (2, 9, 8, 3, 16, (5, 5), (2, 2), ((2, 1), (1, 2)), (1, 1)),
    "7x7 stride 3": (1, 13, 11, 5, 3, (7, 7), (3, 3), ((3, 2), (0, 3)), (1, 1)),
    "1x3 uneven": (2, 6, 9, 8, 24, (1, 3), (1, 2), ((0, 0), (1, 1)), (1, 1)),
    "3x3 dilated": (1, 10, 11, 16, 16, (3, 3), (1, 1), ((2, 2), (2, 1)), (2, 2)),
    "3x3 dilated, stride 2 and 3": (1, 12, 13, 8, 8, (3, 3), (2, 3), ((1, 2), (2, 2)), (2, 2)),
    "wide padding": (1, 4, 5, 8, 8, (2, 2), (1, 1), ((3, 2), (1, 4)), (1, 1)),
    "fully connected": (40, 1, 1, 136, 24, (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
}
PASSES = list(product(("forward", "input", "weight"), ("bf16", "tf32")))


def rounded(x, compute):
    """Round float32 to bf16 (to nearest even), or to tf32 (10 bits of mantissa, to nearest, halves away from zero)."""
    x = np.float32(x)
    if compute == "bf16":
        return x.astype(types.bfloat16()).astype(np.float32)
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


class Case:
    """Operands of one convolution, and what its passes should give."""

    def __init__(self, case, compute):
        n, h, w, c, k, (r, s), self.stride, self.padding, self.dilation = case
        p, q = output_size((h, w), (r, s), self.stride, self.padding, self.dilation)
        random = np.random.default_rng(prod((n, h, w, c, k)))
        shapes = (n, h, w, c), (k, r, s, c), (n, p, q, k)
        self.x, self.weight, self.grad = (np.float32(random.standard_normal(shape)) for shape in shapes)
        self.bias = {"forward": np.float32(random.standard_normal(k)), "input": np.float32(random.standard_normal(c))}
        before = self.padding[0][0], self.padding[1][0]
        numbers = (n, h, w, c, k, r, s, p, q, *self.stride, *before, *self.dilation, 1)
        self.geometry, self.compute = products.Geometry(*numbers), compute

    def problem(self, kind):
        """Return the pass as `products` states it."""
        return products.Problem(kind, self.compute, self.geometry)

    def expected(self, kind, activation=None):
        """Return the float64 result; with bias where there is an activation."""
        x, weight, grad = (rounded(a, self.compute) for a in (self.x, self.weight, self.grad))
        where = (self.stride, self.padding, self.dilation)
        if kind == "forward":
            result = reference.conv2d(x, weight, None, *where)
        else:
            result = reference.conv2d_gradients(x, weight, grad, *where)[kind == "weight"]
        return result if activation is None else reference.activation(result + self.bias[kind], activation)

    def computed(self, device, kind, run, activation=None):
        """Return what a candidate makes of the operands."""
        storage = self.problem(kind).storage
        x, grad = device.upload(self.x.astype(storage)), device.upload(self.grad.astype(storage))
        weight = device.upload(self.weight)
        if kind == "weight":
            out = device.upload(np.full(self.weight.shape, np.nan, np.float32))
            run(x, grad, out)
        else:
            source, shape = (x, self.grad.shape) if kind == "forward" else (grad, self.x.shape)
            out = device.upload(np.full(shape, np.nan, storage))
            run(source, weight, None if activation is None else device.upload(self.bias[kind]), out, activation)
        return np.float64(device.download(out))


def check(device, case, kind, tile, splits=1, activation=None):
    """Compare one tile's result with the loops."""
    run = mma.candidate(case.problem(kind), tile, splits).run
    got, want = case.computed(device, kind, run, activation), case.expected(kind, activation)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < TOLERANCE[case.compute, kind != "weight"], (tile.name, splits, error)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("kind", "compute"), PASSES)
def test_geometries(device, name, kind, compute) -> None:
    case = Case(CASES[name], compute)
    tiles = mma.tiles(case.problem(kind))
    for tile in [tile for tile in tiles if tile.tall * tile.wide == 64 * 64 or tile.copy < 16]:
        check(device, case, kind, tile)


@pytest.mark.parametrize(("kind", "compute"), PASSES)
def test_every_tile_of_several(device, kind, compute) -> None:
    """More than one tile along both axes, none of them full."""
    case = Case((3, 10, 9, 24, 136, (1, 3), (1, 1), ((0, 0), (1, 1)), (1, 1)), compute)
    if kind == "input":
        case = Case((3, 10, 9, 136, 24, (1, 3), (1, 1), ((0, 0), (1, 1)), (1, 1)), compute)
    for tile in mma.tiles(case.problem(kind)):
        check(device, case, kind, tile)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize(("kind", "compute"), PASSES)
def test_split_reductions(device, kind, compute, splits) -> None:
    case = Case(PLAIN, compute)
    activation = None if kind == "weight" else "leaky_relu"
    check(device, case, kind, mma.tiles(case.problem(kind))[-1], splits, activation)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("name", ["7x7 stride 3", "1x1 stride 2"])
@pytest.mark.parametrize(("kind", "compute"), PASSES[:4])
def test_bias_and_activation(device, kind, compute, name, activation) -> None:
    case = Case(CASES[name], compute)
    check(device, case, kind, mma.tiles(case.problem(kind))[-1], 1, activation)


@pytest.mark.parametrize(("kind", "compute"), PASSES)
def test_same_bits_every_time(device, kind, compute) -> None:
    case = Case(PLAIN, compute)
    run = mma.candidate(case.problem(kind), mma.tiles(case.problem(kind))[-1], 3).run
    first, second = (case.computed(device, kind, run) for _ in range(2))
    assert np.array_equal(first, second)


def test_offers(device) -> None:
    for kind, compute in PASSES:
        offered = mma.candidates(Case(PLAIN, compute).problem(kind))
        names = [candidate.name for candidate in offered]
        assert 1 < len(names) == len(set(names)) <= mma.MAX_OFFERS
    plain = Case(PLAIN, "tf32").geometry
    assert not mma.candidates(products.Problem("forward", "fp32", plain))
    assert not mma.candidates(products.Problem("forward", "tf32", plain._replace(groups=8)))
    assert not mma.candidates(products.Problem("forward", "tf32", plain._replace(n=2**26)))
    assert not mma.candidates(products.Problem("input", "tf32", plain._replace(stride_h=9)))
