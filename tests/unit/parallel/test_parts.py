"""One layer on its rank's part of the data, for any geometry and grid, is the layer on all of it.

Ranks are played one after the other in one process, without messages: what a rank reads is cut out of the whole input,
gradients of what several have read are added up.
"""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import numpy as np
import pytest

from hpcnn.errors import HpcnnError
from hpcnn.geometry import slices
from hpcnn.nn.model import Model
from hpcnn.nn.partial import PartialSum
from hpcnn.plan.layout import Layout, extent, volume, within
from hpcnn.plan.parts import part
from hpcnn.plan.placement import Placed, place
from hpcnn.plan.planner import AXES
from hpcnn.spec import (
    INPUT,
    ActivationSpec,
    ConvSpec,
    DropoutSpec,
    GlobalAveragePoolSpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    PoolSpec,
    ShortcutSpec,
)
from tests.serial import context


def random_layer(draw: np.random.Generator) -> LayerSpec:
    """Return a layer of random kind and geometry; it may not fit its input."""

    def pair(top: int) -> tuple[int, int]:
        return int(draw.integers(1, top)), int(draw.integers(1, top))

    padding = tuple((int(draw.integers(0, 3)), int(draw.integers(0, 3))) for _ in range(2))
    shape = (*map(int, draw.integers(2, 12, 2)), int(draw.integers(1, 4)))
    common = {"name": "x", "inputs": (INPUT,), "input_shape": shape}
    window = {"stride": pair(4), "padding": padding}
    activation = draw.choice([None, "relu", "leaky_relu"])
    out = int(draw.integers(1, 6))
    match int(draw.integers(0, 8)):
        case 0 | 1 | 2:
            options = window | {"kernel_size": pair(5), "dilation": pair(3), "activation": activation}
            return ConvSpec(**common, out_channels=out, bias=bool(draw.integers(2)), **options)
        case 3:
            return PoolSpec(**common, kind=str(draw.choice(["max", "average"])), window=pair(4), **window)
        case 4:
            return GlobalAveragePoolSpec(**common)
        case 5:
            return ShortcutSpec(**common, out_channels=shape[2] + out, stride=pair(4))
        case 6:
            return ActivationSpec(**common)
    flat = common | {"input_shape": (prod(shape),)}
    if draw.integers(3):
        return DropoutSpec(**(flat if draw.integers(2) else common), rate=0.4)
    return LinearSpec(**flat, out_features=out, activation=activation)


def random_case(seed: int) -> tuple[ModelSpec, Layout, int, int]:
    """Return a model of one layer, a layout that is not refused, the number of ranks and of samples."""
    draw = np.random.default_rng(seed)
    while True:
        ranks, samples = int(draw.integers(1, 10)), int(draw.integers(1, 6))
        grids = [grid for grid in itertools.product(range(1, ranks + 1), repeat=5) if prod(grid) == ranks]
        layout = Layout(**dict(zip(AXES, grids[draw.integers(len(grids))], strict=True)))
        try:
            layer = random_layer(draw)
            if isinstance(layer, PoolSpec) and any(
                max(pad) >= size for pad, size in zip(layer.padding, layer.window, strict=True)
            ):
                continue  # refused on one rank too
            model = ModelSpec(name="one", input_shape=layer.input_shape, num_classes=1, layers=(layer,))
            place(model, {"x": layout}, frozenset(), ranks, samples)
        except HpcnnError:
            continue
        return model, layout, ranks, samples


class Player:
    """What one rank has of the layer, and of the batch."""

    def __init__(self, model: ModelSpec, layout: Layout, placed: Placed, rank: int, samples: int) -> None:
        self.owned, self.partial, self.needed = placed.owned[rank], placed.partial[rank], placed.needed[rank]
        mine = part(model.layers[0], layout, self.partial, rank)
        self.layer = Model(model, 1, np.float64, [mine]).layers[0]
        self.tensors = {short: slices(box) for short, box in mine.tensors.items()}
        self.context = context(samples, samples=np.arange(samples)[slice(*self.partial[0])])
        self.kept: Any = None


@pytest.mark.parametrize("seed", range(400))
def test_output_and_all_gradients_are_those_of_the_whole_layer(seed: int) -> None:
    model, layout, ranks, samples = random_case(seed)
    draw = np.random.default_rng(seed)
    layer = model.layers[0]
    x = draw.standard_normal((samples, *layer.input_shape))
    whole = Model(model, 1, np.float64)
    for parameter in whole.parameters.parameters:
        parameter.value[...] = draw.standard_normal(parameter.value.shape)
    step = context(samples)
    y, kept = whole.layers[0].forward((x,), step)
    grad = draw.standard_normal(y.shape)
    error = whole.layers[0].error(grad, kept, step)
    whole.layers[0].backward_weight(error, kept, step)
    (dx,) = whole.layers[0].backward_input(error, kept, step)

    placed = place(model, {"x": layout}, frozenset(), ranks, samples).layers["x"]
    found_y, found_dx = np.full_like(y, np.nan), np.zeros_like(x)
    grads = {name: np.zeros_like(p.grad) for name, p in whole.layers[0].parameters.items()}
    players = [Player(model, layout, placed, rank, samples) for rank in range(ranks) if volume(placed.partial[rank])]
    sums = {player.partial: np.zeros(extent(player.partial)) for player in players}
    for player in players:
        for name, parameter in player.layer.parameters.items():
            parameter.value[...] = whole.layers[0].parameters[name].value[player.tensors[name]]
        piece, player.kept = player.layer.forward((x[slices(player.needed)],), player.context)
        assert piece.shape == extent(player.partial)
        sums[player.partial] += piece
    errors = {player.partial: np.zeros(extent(player.partial)) for player in players}
    for player in players:
        here = within(player.owned, player.partial)
        piece = sums[player.partial][here]
        if isinstance(player.layer, PartialSum):
            piece, player.kept = player.layer.complete(np.array(piece), player.kept)
        found_y[slices(player.owned)] = piece
        back = np.ascontiguousarray(grad[slices(player.owned)])
        errors[player.partial][here] += player.layer.error(back, player.kept, player.context)
    for player in players:
        error = errors[player.partial]
        player.layer.backward_weight(error, player.kept, player.context)
        (back,) = player.layer.backward_input(error, player.kept, player.context)
        found_dx[slices(player.needed)] += back
        for name, parameter in player.layer.parameters.items():
            grads[name][player.tensors[name]] += parameter.grad
    np.testing.assert_allclose(found_y, y, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found_dx, dx, rtol=1e-10, atol=1e-10)
    for name, parameter in whole.layers[0].parameters.items():
        np.testing.assert_allclose(grads[name], parameter.grad, rtol=1e-10, atol=1e-10)


def test_the_cases_are_of_all_kinds_and_of_up_to_nine_ranks() -> None:
    cases = [random_case(seed) for seed in range(400)]
    assert len({type(model.layers[0]) for model, _, _, _ in cases}) == 7
    assert {ranks for _, _, ranks, _ in cases} == set(range(1, 10))
    assert {name for _, layout, _, _ in cases for name in layout.name.split("+")} == {
        "data",
        "spatial",
        "filter",
        "row",
    }
