"""Layouts, placements and movements in integers: who owns, computes, reads and sends what."""

from __future__ import annotations

import itertools
from math import prod
from operator import mul

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.errors import PlanError
from hpcnn.geometry import Block, blocks, slices
from hpcnn.nn import models
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.nn.models.yolo import yolo16
from hpcnn.plan import placement
from hpcnn.plan.exchanges import bucket_loads, choose_buckets
from hpcnn.plan.layout import Layout, contains, extent, hull, intersect, volume
from hpcnn.plan.movement import Movement
from hpcnn.plan.placement import check, place
from hpcnn.plan.planner import AXES, make_plan
from hpcnn.spec import INPUT, ConvSpec, LayerSpec, PoolSpec

GRIDS = [
    (ranks, grid) for ranks in range(1, 10) for grid in itertools.product(range(1, 10), repeat=5) if prod(grid) == ranks
]


def box(*bounds: tuple[int, int]) -> tuple[Block, ...]:
    return tuple(Block(*pair) for pair in bounds)


@pytest.mark.parametrize("shape", [(7, 5, 3, 11), (2, 1, 9, 4)])
def test_the_boxes_of_a_layout_cover_a_tensor_once(shape: tuple[int, int, int, int]) -> None:
    for ranks, grid in GRIDS:
        layout = Layout(**dict(zip(AXES, grid, strict=True)))
        owned, partial = (layout.boxes(ranks, shape[0], shape[1:], owned=whose) for whose in (True, False))
        for boxes, times in ((owned, 1), (partial, layout.inner)):
            counts = np.zeros(shape, int)
            for own in boxes:
                counts[slices(own)] += 1
            np.testing.assert_array_equal(times, counts)
        assert all(map(contains, partial, owned))


def test_boxes_meet_and_are_surrounded() -> None:
    a, b, nothing = box((0, 3), (2, 6)), box((2, 5), (4, 9)), box((0, 0), (0, 0))
    assert box((2, 3), (4, 6)) == intersect(a, b)
    assert volume(intersect(a, box((3, 5), (2, 6)))) == 0
    assert box((0, 5), (2, 9)) == hull([a, nothing, b])
    assert contains(a, box((1, 2), (2, 6)))
    assert contains(a, nothing)
    assert not contains(a, b)


def windowed(draw: np.random.Generator) -> LayerSpec:
    """Return a convolution or a pooling layer of random geometry."""
    while True:
        kernel, stride, dilation = (tuple(map(int, draw.integers(1, top, 2))) for top in (5, 4, 3))
        padding = tuple(tuple(map(int, draw.integers(0, 3, 2))) for _ in range(2))
        shape = (*map(int, draw.integers(3, 14, 2)), 2)
        layer: LayerSpec
        if draw.random() < 0.6:
            geometry = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
            layer = ConvSpec(name="x", inputs=(INPUT,), input_shape=shape, out_channels=3, **geometry)
        else:
            geometry = {"window": kernel, "stride": stride, "padding": padding}
            layer = PoolSpec(name="x", inputs=(INPUT,), input_shape=shape, kind="max", **geometry)
        try:
            layer.output_shape  # noqa: B018 - raises where the window does not fit
            check(layer, Layout(height=2), 2)
        except Exception:
            continue
        return layer


@pytest.mark.parametrize("seed", range(200))
def test_a_layer_reads_the_smallest_box_around_its_windows(seed: int) -> None:
    draw = np.random.default_rng(seed)
    layer = windowed(draw)
    size = layer.kernel_size if isinstance(layer, ConvSpec) else layer.window
    dilation = layer.dilation if isinstance(layer, ConvSpec) else (1, 1)
    blocks = []
    for axis in range(2):
        start, stop = sorted(draw.choice(layer.output_shape[axis] + 1, 2, replace=False).tolist())
        blocks.append((start, stop))
    wanted = box((0, 1), *blocks, (0, layer.output_shape[2]))
    read, padding = placement.needs(layer, wanted), placement.padding(layer, wanted)
    for axis, (start, stop) in enumerate(blocks):
        if stop - start == layer.output_shape[axis]:  # not cut: as it is
            assert (read[1 + axis], padding[axis]) == ((0, layer.input_shape[axis]), layer.padding[axis])
            continue
        before, step = layer.padding[axis][0], layer.stride[axis]
        touched = {o * step - before + k * dilation[axis] for o in range(start, stop) for k in range(size[axis])}
        inside = [t for t in touched if 0 <= t < layer.input_shape[axis]]
        first, last = min(touched), max(touched) + 1
        assert read[1 + axis] == (max(first, 0), min(last, layer.input_shape[axis]))
        assert read[1 + axis].start <= min(inside)
        assert max(inside) < read[1 + axis].stop
        assert padding[axis] == (max(0, -first), max(0, last - layer.input_shape[axis]))


# Rama, Threadgill, Gerstlauer: 16 layers at 608 x 608; where groups start -> work over the serial work, halo in MB.
ROUND = {
    (2, 2): {(0,): (1.247, 0.0), (0, 8): (1.098, 1.01), (0, 4, 8, 12): (1.028, 0.96), "every": (1.0, 1.10)},
    (2, 3): {(0,): (1.380, 0.0), (0, 4, 8, 12): (1.042, 1.46), "every": (1.0, 1.66)},
    (4, 4): {(0,): (1.845, 0.0), (0, 4, 8, 12): (1.086, 3.06), "every": (1.0, 3.40)},
    (4, 6): {(0,): (2.179, 0.0), (0, 4, 8, 12): (1.117, 4.17), "every": (1.0, 4.58)},
}


@pytest.mark.parametrize("grid", ROUND)
def test_redundant_work_and_halos_of_fused_groups_are_those_of_the_literature(grid: tuple[int, int]) -> None:
    model, ranks = yolo16((608, 608, 3), 10, batchnorm=False), prod(grid)
    tiled = model.layers[:16]
    layouts = {layer.name: Layout(height=grid[0], width=grid[1]) for layer in tiled}
    layouts |= {layer.name: Layout() for layer in model.layers[16:]}
    for starts, (work, halo_mb) in ROUND[grid].items():
        first = range(16) if starts == "every" else starts
        fused = frozenset(layer.name for i, layer in enumerate(tiled) if i not in first)
        placed = place(model, layouts, fused, ranks, 1)
        flops = sum(
            layer.forward_flops * sum(map(volume, placed.layers[layer.name].computed)) / prod(layer.output_shape)
            for layer in tiled
        )
        moved = [layer for layer in tiled if placed.layers[layer.name].moved[0]]
        sent = sum(
            placed.movement(layer.name, layer.inputs[0]).num_elements_sent(rank)
            for layer in moved
            for rank in range(ranks)
        )
        assert flops / sum(layer.forward_flops for layer in tiled) == pytest.approx(work, abs=5e-4)
        assert 4e-6 * sent == pytest.approx(halo_mb, abs=5e-3)


@pytest.mark.parametrize("grid", ROUND)
def test_where_all_settle_backward_does_no_work_twice_and_forward_as_before(grid: tuple[int, int]) -> None:
    model, ranks = yolo16((608, 608, 3), 10, batchnorm=False), prod(grid)
    tiled = model.layers[:16]
    layouts = {layer.name: Layout(height=grid[0], width=grid[1]) for layer in tiled}
    layouts |= {layer.name: Layout() for layer in model.layers[16:]}
    every = frozenset(layer.name for layer in tiled)

    def work(boxes: str, settled: frozenset[str]) -> float:
        placed = place(model, layouts, every, ranks, 1, settled=settled).layers
        done = [sum(map(volume, getattr(placed[layer.name], boxes))) / prod(layer.output_shape) for layer in tiled]
        flops = [layer.forward_flops for layer in tiled]
        return sum(map(mul, done, flops)) / sum(flops)

    redundant, _ = ROUND[grid][0,]
    assert work("computed", every) == work("computed", frozenset()) == pytest.approx(redundant, abs=5e-4)
    assert work("returned", every) == 1.0
    assert work("returned", frozenset()) == work("computed", frozenset())
    some = work("returned", frozenset(layer.name for i, layer in enumerate(tiled) if i in (4, 8, 12)))
    assert some == pytest.approx(ROUND[grid][0, 4, 8, 12][0], abs=5e-4), "groups of backward as in the literature"


def test_only_what_is_fused_may_settle() -> None:
    model = yolo16((76, 76, 3), 10, batchnorm=False)
    layouts = dict(make_plan(model, "spatial", 4, 1).layouts)
    with pytest.raises(PlanError, match=r"'conv2' is to settle .* is not fused to that input\. Set fused"):
        place(model, layouts, frozenset({"conv3"}), 4, 1, settled=frozenset({"conv2", "conv3"}))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_hybrid_sends_what_its_formulas_say(name: str, ranks: int) -> None:
    model = models.build(name, (227, 227, 3) if name == "alexnet" else (224, 224, 3), 1000)
    samples = 16 * ranks
    plan = make_plan(model, "hybrid", ranks, samples)
    placed = plan.place(model, samples)
    linear = [layer for layer in model.layers if layer.name.startswith("fc")]
    features = linear[0].input_shape[0]
    source = linear[0].inputs[0]
    border = placed.movement(linear[0].name, source)
    for rank in range(ranks):
        received = sum(volume(parcel.box) for parcel in border.receives(rank))
        assert received == features * (samples // ranks) * (ranks - 1)  # and back by a reduce-scatter of as many
    assert border.gathered() == [features * samples * rank // ranks for rank in range(ranks + 1)]
    for layer in linear[1:]:
        way = placed.movement(layer.name, layer.inputs[0])
        width = layer.input_shape[0]
        assert [sum(volume(p.box) for p in way.receives(0))] == [samples * width * (ranks - 1) // ranks]
        assert way.gathered() is not None
    buckets = choose_buckets(
        model, "allreduce", bucket_bytes=1, ranks=ranks, global_batch=samples, plan=plan, rank=ranks - 1
    )
    sent = {bucket.layers[0]: bucket_loads(bucket, model, "ring", 0, ranks, samples) for bucket in buckets}
    for layer in model.layers:
        if layer in linear:
            assert sent[layer.name] == ()  # the owner's gradient is complete
        elif layer.parameters:
            assert sent[layer.name][0].num_bytes == pytest.approx(
                8 * layer.num_parameters * (ranks - 1) / ranks, rel=0.02, abs=16
            )


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_column_and_a_row_layer_exchange_one_sum(ranks: int) -> None:
    model, samples = models.build("vgg16", (224, 224, 3), 1000), 16 * ranks
    placed = make_plan(model, "hybrid-rows", ranks, samples).place(model, samples)
    fc1, fc2, fc3 = (layer for layer in model.layers if layer.name.startswith("fc"))
    between = model.layers[model.layers.index(fc1) + 1 :]
    assert not any(moved for layer in between for moved in placed.layers[layer.name].moved)
    assert placed.summing(fc1.name) is None
    for layer in (fc2, fc3):
        ends, sums = blocks(layer.output_shape[0], ranks), placed.summing(layer.name)
        assert sums is not None
        assert sums.gathered() == [samples * end.start for end in ends] + [samples * layer.output_shape[0]]
        for rank in range(ranks):
            # Forward it sends its parts of the others' sums; backward it is sent the others' errors, just as many.
            received = sum(volume(parcel.box) for parcel in sums.receives(rank))
            assert received == samples * (layer.output_shape[0] - ends[rank].size)
            read = blocks(layer.input_shape[0], ranks)[rank]
            assert placed.layers[layer.name].needed[rank] == ((0, samples), read)
            assert placed.layers[layer.name].owned[rank] == ((0, samples), ends[rank])


def test_a_rank_owns_a_piece_of_the_channels_that_its_cell_sums() -> None:
    layout = Layout(channel=3, inner=3)
    made = [layout.output_channels(rank, 11, owned=False) for rank in range(9)]
    assert made == [(0, 4)] * 3 + [(4, 8)] * 3 + [(8, 11)] * 3
    owned = [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7), (7, 8), (8, 9), (9, 10), (10, 11)]
    assert [layout.output_channels(rank, 11) for rank in range(9)] == owned
    assert [layout.input_channels(rank, 7) for rank in range(9)] == [(0, 3), (3, 5), (5, 7)] * 3


def test_a_movement_names_what_nobody_owns() -> None:
    way = Movement((box((0, 2)), box((2, 4))), (box((0, 4)), box((1, 5))))
    assert [(1, box((2, 4)))] == way.receives(0)
    with pytest.raises(PlanError, match="rank 1 needs 4 elements of which others and it own 3"):
        way.receives(1)


def test_only_pieces_of_one_box_that_all_need_are_a_gather() -> None:
    halves = (box((0, 2), (0, 3)), box((2, 4), (0, 3)))
    whole = box((0, 4), (0, 3))
    assert Movement(halves, (whole, whole)).gathered() == [0, 6, 12]
    columns = (box((0, 4), (0, 1)), box((0, 4), (1, 3)))
    assert Movement(columns, (whole, whole)).gathered() == [0, 4, 12]
    assert Movement(halves, (whole, halves[1])).gathered() is None
    assert Movement(halves, (halves[1], halves[1])).gathered() is None


@pytest.mark.parametrize(
    ("preset", "ranks", "layer", "layout", "message"),
    [
        ("lenet5", 2, "conv1", Layout(height=3), "has a grid of 3 ranks .* and there are 2"),
        ("lenet5", 2, "fc1", Layout(height=2), "has 120 features without rows and columns"),
        ("lenet5", 3, "conv1", Layout(channel=2), "is cut along channels.* leaves out some of 3"),
        ("lenet5", 8, "conv1", Layout(channel=8), "has 6 channels, too few"),
        ("lenet5", 2, "flatten_fc1", Layout(channel=2), "is a flatten"),
        ("resnet20", 3, "block1_1_norm1", Layout(channel=2), "is cut along channels.* leaves out some of 3"),
        ("resnet20", 2, "block1_1_norm1", Layout(inner=2), "does not sum over input channels"),
        ("lenet5", 3, "fc1", Layout(inner=2), "is cut along channels.* leaves out some of 3"),
        ("lenet5", 2, "conv1", Layout(inner=2), "has 1 input channels, too few for inner"),
        ("lenet5", 2, "flatten_fc1", Layout(inner=2), "does not sum over input channels"),
    ],
)
def test_what_is_not_known_to_be_right_is_refused(
    preset: str, ranks: int, layer: str, layout: Layout, message: str
) -> None:
    model = models.build(preset, (28, 28, 1) if preset == "lenet5" else (32, 32, 3), 10)
    layouts = {one.name: Layout(sample=ranks) for one in model.layers} | {layer: layout}
    with pytest.raises(PlanError, match=f"layer '{layer}' {message}"):
        place(model, layouts, frozenset(), ranks, 8)


def test_batch_norms_and_cut_channels_are_not_fused_over_borders() -> None:
    resnet = models.build("resnet20", (32, 32, 3), 10)
    layouts = {one.name: Layout(height=2) for one in resnet.layers[:-2]}
    layouts |= {one.name: Layout(sample=2) for one in resnet.layers[-2:]}
    with pytest.raises(PlanError, match="is a batch norm, whose statistics take every position once"):
        place(resnet, layouts, frozenset({"block1_1_conv2"}), 2, 4)
    lenet = models.build("lenet5", (28, 28, 1), 10)
    cut = {one.name: Layout(sample=2) for one in lenet.layers} | {"conv1": Layout(channel=2)}
    reader = next(one.name for one in lenet.layers if "conv1" in one.inputs)
    with pytest.raises(PlanError, match="'conv1' is cut along channels"):
        place(lenet, cut, frozenset({reader}), 2, 4)


def test_nothing_is_fused_to_partial_sums_that_reads_more_than_a_rank_owns() -> None:
    vgg = models.build("vgg11-32", (32, 32, 3), 10)
    below, layer = [one for one in vgg.layers if isinstance(one, ConvSpec)][2:4]
    layouts = {one.name: Layout(sample=4) for one in vgg.layers} | {below.name: Layout(height=2, inner=2)}
    assert layer.inputs == (below.name,)
    layouts[layer.name] = Layout(height=2, inner=2)
    place(vgg, layouts, frozenset(), 4, 4)
    with pytest.raises(PlanError, match=f"'{below.name}' has partial sums.*Set fused = false"):
        place(vgg, layouts, frozenset({layer.name}), 4, 4)


def test_grouped_filters_are_not_cut() -> None:
    layer = ConvSpec(
        name="x", inputs=(INPUT,), input_shape=(5, 5, 4), out_channels=4, kernel_size=(3, 3), groups=2, bias=False
    )
    for layout in (Layout(channel=2), Layout(inner=2)):
        with pytest.raises(PlanError, match="layer 'x' has filters in 2 groups"):
            check(layer, layout, 2)


def test_fused_layers_cut_samples_alike() -> None:
    vgg = models.build("vgg11-32", (32, 32, 3), 10)
    layouts = {one.name: Layout(height=3, width=2) for one in vgg.layers[:2]}
    layouts |= {one.name: Layout(sample=6) for one in vgg.layers[2:]}
    with pytest.raises(PlanError, match=f"'{vgg.layers[2].name}' is fused to '{vgg.layers[1].name}', and their grids"):
        place(vgg, layouts, frozenset({vgg.layers[2].name}), 6, 5)


def test_who_owns_nothing_of_a_layer_makes_all_channels_of_what_is_fused_to_it() -> None:
    graph = GraphBuilder("x", (4, 4, 3))
    graph.conv("conv", 6, 3, padding=1)
    graph.batchnorm("norm")
    model = graph.finish(1)
    layouts = {"conv": Layout(height=5), "norm": Layout(channel=5)}
    placed = place(model, layouts, frozenset({"norm"}), 5, 2).layers
    assert volume(placed["conv"].owned[4]) == 0
    assert placed["conv"].computed == (box((0, 2), (0, 4), (0, 4), (0, 6)),) * 5
    assert placed["conv"].returned == placed["conv"].computed
    assert placed["norm"].needed[4] == box((0, 2), (0, 4), (0, 4), (5, 6))


def test_tiles_lie_under_those_of_the_layer_above() -> None:
    model = yolo16((76, 76, 3), 10, batchnorm=False)
    placed = make_plan(model, "spatial", 3, 1).place(model, 1)
    pools = [layer for layer in model.layers if isinstance(layer, PoolSpec)]
    assert pools
    assert not any(placed.layers[layer.name].moved[0] for layer in pools)
    assert extent(placed.images[0])[1:3] != (76, 76)


@pytest.mark.parametrize("preset", ["lenet5", "resnet20"])
@pytest.mark.parametrize(("ranks", "num_samples"), [(1, 3), (2, 5), (5, 5), (6, 4)])
def test_whole_samples_are_placed_at_once_as_one_layer_after_the_other(preset, ranks, num_samples, monkeypatch):
    settings = configuration.load(preset, [])
    model = models.configured(settings.model, settings.data.image_shape, settings.data.num_classes)
    layouts = {layer.name: Layout(sample=ranks) for layer in model.layers}
    fast = placement.place(model, layouts, frozenset(), ranks, num_samples)
    monkeypatch.setattr(placement, "set", lambda layouts: None, raising=False)  # so that the shortcut is not taken
    monkeypatch.setattr(placement, "_by_samples", lambda *args: pytest.fail("the shortcut was taken"))
    assert fast == placement.place(model, layouts, frozenset(), ranks, num_samples)
