"""What is saved of a tile, cut down to a part of it, is what is saved of that part; and the rest is let go."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest

from hpcnn.errors import HpcnnError
from hpcnn.geometry import Block, slices
from hpcnn.nn.build import build
from hpcnn.nn.model import Model
from hpcnn.parallel.narrow import Cut, Cuts, Narrower, make_cuts
from hpcnn.parallel.pieces import padded
from hpcnn.plan.layout import Box, Layout, extent
from hpcnn.plan.parts import part
from hpcnn.plan.placement import check, needs, place
from hpcnn.spec import INPUT, ActivationSpec, ConvSpec, LayerSpec, ModelSpec, PoolSpec
from tests.serial import context
from tests.unit.parallel.test_parts import random_layer

SAMPLES = 2


def whole_and_part(seed: int) -> tuple[LayerSpec, Box, Box]:
    """Return a layer of random kind and geometry, all of its output, and a part of its rows and columns."""
    draw = np.random.default_rng(seed)
    while True:
        layer = random_layer(draw)
        try:
            shape = layer.output_shape
            check(layer, Layout(), 1)
            if len(shape) == 3:
                check(layer, Layout(height=2), 2)
            if isinstance(layer, PoolSpec) and any(
                max(pad) >= size for pad, size in zip(layer.padding, layer.window, strict=True)
            ):
                continue
        except HpcnnError:
            continue
        box = [Block(0, SAMPLES), *(Block(0, size) for size in shape)]
        for axis in (1, 2) if len(shape) == 3 else ():
            box[axis] = Block(*sorted(draw.choice(shape[axis - 1] + 1, 2, replace=False).tolist()))
        return layer, (Block(0, SAMPLES), *(Block(0, size) for size in shape)), tuple(box)


@pytest.mark.parametrize("seed", range(200))
def test_backward_of_a_part_is_the_same_from_what_was_saved_of_the_whole(seed: int) -> None:
    spec, computed, returned = whole_and_part(seed)
    draw, step = np.random.default_rng(seed), context(SAMPLES)
    model = Model(ModelSpec(name="one", input_shape=spec.input_shape, num_classes=1, layers=(spec,)), 1, np.float64)
    layer, smaller = model.layers[0], padded(model, model.layers[0], spec, returned)
    if smaller is layer:
        smaller = build(spec, model.parameters)
    smaller.box = returned[1:]
    needed, reached = needs(spec, computed), needs(spec, returned)
    x = draw.standard_normal(extent(needed))
    y, saved = layer.forward((x,), step)
    cuts = Cuts(
        {"x": Cut(computed, returned, needed, reached, (INPUT,))},
        {INPUT: (needed, reached), "x": (computed, returned)},
    )
    narrowed = Narrower(cuts, {INPUT: x}).narrow(layer, saved)
    part, kept = smaller.forward((x[slices(reached)],), step)
    np.testing.assert_allclose(part, y[slices(returned)], rtol=1e-12, atol=1e-12)
    grad, results = draw.standard_normal(part.shape), []
    for one in (kept, narrowed):
        error = smaller.error(grad, one, step)
        smaller.backward_weight(error, one, step)
        (dx,) = smaller.backward_input(error, one, step)
        results.append([dx, *(np.array(parameter.grad) for parameter in smaller.parameters.values())])
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_an_activation_that_two_layers_save_is_cut_once_and_the_whole_of_it_is_let_go() -> None:
    shape, window = (40, 8, 2), {"kernel_size": (5, 5), "padding": ((2, 2), (2, 2)), "activation": "relu"}
    names = (INPUT, "a", "b", "c")
    layers = tuple(
        ConvSpec(name=name, inputs=(below,), input_shape=shape, out_channels=2, **window)
        for below, name in itertools.pairwise(names)
    )
    spec = ModelSpec(name="three", input_shape=shape, num_classes=1, layers=layers)
    layouts, fused = {layer.name: Layout(height=4) for layer in layers}, frozenset({"b", "c"})
    placement = place(spec, layouts, fused, 4, 1, settled=fused)
    parts = [part(layer, layouts[layer.name], placement.layers[layer.name].computed[1], 1) for layer in layers]
    model = Model(spec, 1, np.float64, parts)
    values = {INPUT: np.random.default_rng(0).standard_normal(extent(placement.images[1]))}
    narrower = Narrower(make_cuts(spec, placement, 1), values)
    saved, whole = {}, {}
    for layer in model.layers:
        name, (below,) = layer.spec.name, layer.spec.inputs
        values[name], saved[name] = layer.forward((values[below],), context(1))
        whole[name] = weakref.ref(values[name])
        del values[below]
        if below != INPUT:
            saved[below] = narrower.narrow(model.layers[names.index(below) - 1], saved[below])
    saved["c"] = narrower.narrow(model.layers[2], saved["c"])
    for below, above in (("a", "b"), ("b", "c")):
        assert np.shares_memory(saved[below][1], saved[above][0])
        assert extent(placement.layers[below].returned[1]) == saved[below][1].shape
        assert extent(placement.layers[above].reached[1]) == saved[above][0].shape
    assert whole["a"]() is None
    assert whole["b"]() is saved["c"][0], "all of it is needed"
    assert [saved[name][1].shape[1] for name in "abc"] == [10, 10, 10]
    assert saved["b"][0].shape[1] == 14


def test_nothing_is_cut_unless_a_layer_settles() -> None:
    shape = (12, 8, 2)
    layers = (
        ConvSpec(
            name="a", inputs=(INPUT,), input_shape=shape, out_channels=2, kernel_size=(3, 3), padding=((1, 1), (1, 1))
        ),
        ActivationSpec(name="b", inputs=("a",), input_shape=shape),
        ConvSpec(
            name="c", inputs=("b",), input_shape=shape, out_channels=2, kernel_size=(3, 3), padding=((1, 1), (1, 1))
        ),
    )
    spec = ModelSpec(name="three", input_shape=shape, num_classes=1, layers=layers)
    layouts = {layer.name: Layout(height=3) for layer in layers}
    fused = frozenset({"b", "c"})
    for rank in range(3):
        assert not make_cuts(spec, place(spec, layouts, fused, 3, 1), rank).operations
    settled = make_cuts(spec, place(spec, layouts, fused, 3, 1, settled=frozenset({"c"})), 1)
    assert settled.operations.keys() == {"a", "b"}
