"""A layer that begins with what its rank owns, and goes on with what it fetches, makes what it makes at once.

Ranks are played one after the other in one process: what a rank would fetch is cut out of the whole input.
"""

from __future__ import annotations

import itertools
from functools import cache
from math import prod

import numpy as np
import pytest

from hpcnn.errors import HpcnnError
from hpcnn.geometry import Block, slices
from hpcnn.nn.model import Model
from hpcnn.parallel import pieces
from hpcnn.plan.interior import interior
from hpcnn.plan.layout import Layout, contains, intersect, volume
from hpcnn.plan.parts import part
from hpcnn.plan.placement import Placement, needs, place
from hpcnn.spec import INPUT, ActivationSpec, ConvSpec, FlattenSpec, LayerSpec, LinearSpec, ModelSpec
from hpcnn.timeline import OFF, Timeline
from tests.serial import context

CASES = 300


def grid_of(draw: np.random.Generator, ranks: int) -> Layout:
    grids = [grid for grid in itertools.product(range(1, ranks + 1), repeat=4) if prod(grid) == ranks]
    n, h, w, c = grids[draw.integers(len(grids))]
    return Layout(sample=n, height=h, width=w, channel=c)


@cache
def random_case(seed: int) -> tuple[ModelSpec, dict[str, Layout], int, int]:
    """Return a layer above another, layouts that are not refused, the number of ranks and of samples."""
    draw = np.random.default_rng(seed)

    def pair(top: int) -> tuple[int, int]:
        return int(draw.integers(1, top)), int(draw.integers(1, top))

    while True:
        ranks, samples = int(draw.integers(1, 6)), int(draw.integers(1, 6))
        shape = (*map(int, draw.integers(2, 16, 2)), int(draw.integers(1, 4)))
        below: LayerSpec = ActivationSpec(name="below", inputs=(INPUT,), input_shape=shape)
        options = {"name": "x", "inputs": ("below",), "activation": draw.choice([None, "relu", "leaky_relu"])}
        layer: LayerSpec
        try:
            if draw.random() < 0.2:
                below = FlattenSpec(name="below", inputs=(INPUT,), input_shape=shape)
                layer = LinearSpec(**options, input_shape=below.output_shape, out_features=int(draw.integers(1, 6)))
            else:
                padding = tuple((int(draw.integers(0, 3)), int(draw.integers(0, 3))) for _ in range(2))
                options |= {"kernel_size": pair(5), "dilation": pair(3), "stride": pair(3), "padding": padding}
                layer = ConvSpec(**options, input_shape=shape, out_channels=int(draw.integers(1, 6)))
            model = ModelSpec(name="two", input_shape=shape, num_classes=1, layers=(below, layer))
            one = grid_of(draw, ranks)
            layouts = {"below": one, "x": one if draw.random() < 0.6 else grid_of(draw, ranks)}
            place(model, layouts, frozenset(), ranks, samples)
        except HpcnnError:
            continue
        return model, layouts, ranks, samples


def placed(seed: int) -> tuple[ModelSpec, dict[str, Layout], Placement, int, int]:
    model, layouts, ranks, samples = random_case(seed)
    return model, layouts, place(model, layouts, frozenset(), ranks, samples), ranks, samples


@pytest.mark.parametrize("seed", range(CASES))
def test_the_interior_is_all_that_depends_on_what_is_owned_and_strips_are_the_rest(seed: int) -> None:
    model, _, placement, ranks, samples = placed(seed)
    layer = model.layers[1]
    for rank in range(ranks):
        box, owned = placement.layers["x"].computed[rank], placement.layers["below"].owned[rank]
        inside, strips = interior(layer, box, owned)
        counts = np.zeros((samples, *layer.output_shape), int)
        for piece in (inside, *strips):
            counts[slices(piece)] += 1
        expected = np.zeros_like(counts)
        expected[slices(box)] = 1
        np.testing.assert_array_equal(expected, counts)
        for strip in strips:
            assert contains(placement.layers["x"].needed[rank], needs(layer, strip))
        if volume(inside):
            assert contains(owned, needs(layer, inside))
            assert len(strips) <= 4 + 2 * (inside[0] != box[0])
        if isinstance(layer, ConvSpec) and volume(inside):
            for strip in strips:  # each row, column or sample of it reads what others own
                axis = next(i for i in range(3) if strip[i] != box[i] and strip[i] != inside[i])
                for index in range(*strip[axis]):
                    line = (*strip[:axis], Block(index, index + 1), *strip[axis + 1 :])
                    assert intersect(owned, needs(layer, line)) != needs(layer, line)


@pytest.mark.parametrize("seed", range(CASES))
def test_pieces_make_and_save_what_the_layer_does_at_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcnn.plan.interior.LEAST_INTERIOR", {ConvSpec: 1e-9, LinearSpec: 1e-9})
    model, layouts, placement, ranks, samples = placed(seed)
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((samples, *model.layers[1].input_shape))
    for rank in range(ranks):
        box = placement.layers["x"].computed[rank]
        local = Model(
            model,
            1,
            np.float64,
            [part(one, layouts[one.name], placement.layers[one.name].computed[rank], rank) for one in model.layers],
        )
        cut = pieces.make_pieces(local, placement, rank).get("x")
        if cut is None:
            continue
        read, step = x[slices(placement.layers["x"].needed[rank])], context(box[0].size)
        expected, kept = local.layers[1].forward((read,), step)
        output = cut.begin(x[slices(placement.layers["below"].computed[rank])], step, OFF)
        found = cut.end(output, read, step, OFF)
        np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-12)
        assert found[0] is read
        assert (found[1] is output) == (kept[1] is not None)
        assert cut.end(output, read, context(box[0].size, training=False), OFF) is None


def shares(seed: int) -> list[float]:
    """Return which part of its output each rank of a case may compute at once."""
    model, _, placement, ranks, _ = placed(seed)
    boxes = [(placement.layers["x"].computed[r], placement.layers["below"].owned[r]) for r in range(ranks)]
    return [volume(interior(model.layers[1], box, own)[0]) / volume(box) for box, own in boxes if volume(box)]


def test_some_cases_have_interiors_and_some_have_tiles_too_small_for_one() -> None:
    found = list(itertools.chain.from_iterable(shares(seed) for seed in range(CASES)))
    assert sum(0 < share < 1 for share in found) > CASES / 4
    assert sum(share == 0 for share in found) > CASES / 10


@pytest.mark.parametrize(("rows", "inside", "used"), [(8, 0, False), (60, 11, False), (200, 46, True)])
def test_a_tile_smaller_than_its_halo_has_no_interior_and_little_of_one_is_not_used(
    rows: int, inside: int, used: bool
) -> None:
    shape, window = (rows, 9, 2), {"kernel_size": (5, 5), "padding": ((2, 2), (2, 2))}
    below = ActivationSpec(name="below", inputs=(INPUT,), input_shape=shape)
    layer = ConvSpec(name="x", inputs=("below",), input_shape=shape, out_channels=3, **window)
    model = ModelSpec(name="two", input_shape=shape, num_classes=1, layers=(below, layer))
    placement = place(model, {"below": Layout(height=4), "x": Layout(height=4)}, frozenset(), 4, 1)
    found, _ = interior(layer, placement.layers["x"].computed[1], placement.layers["below"].owned[1])
    assert inside == found[1].size
    assert used == ("x" in pieces.make_pieces(Model(model, 1), placement, 1))


def test_the_timeline_shows_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcnn.plan.interior.LEAST_INTERIOR", {ConvSpec: 0.5, LinearSpec: 0.5})
    seed = next(seed for seed in range(CASES) if any(0.5 <= share < 1 for share in shares(seed)))
    model, layouts, placement, ranks, samples = placed(seed)
    x, timeline = np.ones((samples, *model.layers[1].input_shape)), Timeline()
    for rank in range(ranks):
        parts = [part(one, layouts[one.name], placement.layers[one.name].computed[rank], rank) for one in model.layers]
        for cut in pieces.make_pieces(Model(model, 1, np.float64, parts), placement, rank).values():
            output = cut.begin(x[slices(placement.layers["below"].computed[rank])], context(samples), timeline)
            cut.end(output, x[slices(placement.layers["x"].needed[rank])], context(samples), timeline)
    assert {"x forward, inside", "x forward, border"} == {span.name for span in timeline.spans}
