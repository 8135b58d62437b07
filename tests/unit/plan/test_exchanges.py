"""What travels for each kind of exchange: the published volumes, the choice by time, and the layout of buckets."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest

from hpcnn.errors import PlanError
from hpcnn.nn import models
from hpcnn.plan.buckets import Bucket, make_buckets
from hpcnn.plan.exchanges import KINDS, Load, bucket_loads, choose_buckets, lazy_rounds
from hpcnn.plan.machine import Link, Machine
from hpcnn.spec import BatchNormSpec, ConvSpec, LinearSpec, ModelSpec

VGG16 = models.build("vgg16", (224, 224, 3), 1000)
ALEXNET = models.build("alexnet", (227, 227, 3), 1000)
SLOW = Machine(network=Link(alpha_s=1e-4, beta_s_per_byte=8.5e-9))  # 1 Gbit/s


def loads(model: ModelSpec, kind: str, ranks: int, batch: int, rank: int = 0) -> dict[str, list[Load]]:
    """Return what a rank sends for each layer, one bucket a layer, by direct exchange."""
    buckets = choose_buckets(model, kind, bucket_bytes=1, ranks=ranks, global_batch=batch)
    return {b.layers[0]: list(bucket_loads(b, model, "pairwise", rank, ranks, batch)) for b in buckets}


def megabytes(model: ModelSpec, ranks: int, batch: int) -> dict[str, float]:
    """Return MB that rank 0 sends in a step, by item; those of convolutions as "conv"."""
    linear = {layer.name for layer in model.layers if isinstance(layer, LinearSpec)}
    total: dict[str, float] = {}
    for layer, items in loads(model, "factors", ranks, batch).items():
        for load in items:
            item = load.item if layer in linear else "conv"
            total[item] = total.get(item, 0.0) + load.num_bytes / 1e6
    return total


@pytest.mark.parametrize(
    ("ranks", "conv", "inputs", "errors", "parameters", "together"),
    [(8, 103, 3.7, 8.2, 432.7, 548), (64, 116, 0.5, 9.3, 486.8, 613), (256, 117, 0.1, 9.4, 492.6, 619)],
)
def test_vgg16_sends_the_published_megabytes(ranks, conv, inputs, errors, parameters, together):
    sent = megabytes(VGG16, ranks, 256)
    assert sent["conv"] == pytest.approx(conv, abs=0.5)
    assert sent["inputs"] == pytest.approx(inputs, abs=0.05)
    assert sent["errors"] == pytest.approx(errors, abs=0.05)
    assert sent["parameters"] == pytest.approx(parameters, abs=0.05)
    assert sum(sent.values()) == pytest.approx(together, abs=0.7)


@pytest.mark.parametrize(("ranks", "expected"), [(8, 968), (64, 1090), (256, 1103)])
def test_a_plain_allreduce_of_vgg16_sends_the_published_megabytes(ranks, expected):
    bucket = Bucket(0, VGG16.num_parameters, ("all",))
    for algorithm in ("ring", "halving-doubling"):
        (load,) = bucket_loads(bucket, VGG16, algorithm, 0, ranks, 256)
        assert load.num_bytes / 1e6 == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("model", [VGG16, ALEXNET], ids=["vgg16", "alexnet"])
def test_every_layer_sends_what_the_formulas_say(model, ranks):
    batch = 8 * ranks
    everyone = [loads(model, "factors", ranks, batch, rank) for rank in range(ranks)]
    for layer in model.layers:
        if not layer.parameters:
            continue
        sent = {
            load.item: sum(item.num_bytes for mine in everyone for item in mine[layer.name] if item.item == load.item)
            for load in everyone[0][layer.name]
        }
        assert all(load.messages == ranks - 1 for mine in everyone for load in mine[layer.name])
        if isinstance(layer, LinearSpec):
            width_out, width_in = layer.parameters["weight"]
            # Over all ranks, hence exact for uneven blocks too; a rank keeps the features that it owns.
            assert set(sent) == {"inputs", "errors", "parameters"}
            assert sent["inputs"] == 4 * width_in * batch * (ranks - 1) // ranks
            assert sent["errors"] == 4 * width_out * batch * (ranks - 1)
            assert sent["parameters"] == 4 * width_in * width_out * (ranks - 1)
        else:
            size = sum(prod(shape) for shape in layer.parameters.values())
            assert sent == {"gradients": 4 * size * (ranks - 1), "parameters": 4 * size * (ranks - 1)}


def test_alexnet_with_four_ranks_sends_a_third_less_by_factors_than_by_allreduce():
    sent = sum(megabytes(ALEXNET, 4, 128).values())
    assert sent / (2 * 3 / 4 * 4 * ALEXNET.num_parameters / 1e6) == pytest.approx(0.55, abs=0.03)


def test_auto_takes_factors_for_fat_layers_and_small_batches_only():
    def kind(batch: int, layer: str) -> str:
        buckets = choose_buckets(
            ALEXNET, "auto", bucket_bytes=4_000_000, ranks=4, global_batch=batch, machine=SLOW, nodes=(0, 1, 2, 3)
        )
        return next(bucket.kind for bucket in buckets if layer in bucket.layers)

    fattest = max((layer for layer in ALEXNET.layers if isinstance(layer, LinearSpec)), key=lambda x: x.num_parameters)
    assert kind(128, fattest.name) == "factors"
    assert kind(400_000, fattest.name) != "factors"


def test_auto_sums_small_buckets_whole_and_large_ones_in_slices():
    lenet = models.build("lenet5", (28, 28, 1), 10)
    settings = {"ranks": 8, "global_batch": 4096, "machine": SLOW, "nodes": tuple(range(8))}
    smallest = min(choose_buckets(lenet, "auto", bucket_bytes=1, **settings), key=lambda bucket: bucket.size)
    assert smallest.kind == "allreduce"
    resnet = models.build("resnet50", (224, 224, 3), 1000)
    assert "sharded" in {b.kind for b in choose_buckets(resnet, "auto", bucket_bytes=25_000_000, **settings)}


@pytest.mark.parametrize("kind", [*KINDS, "auto"])
@pytest.mark.parametrize("name", ["lenet5", "resnet20", "vgg16-32", "alexnet"])
def test_buckets_of_any_kind_cover_the_flat_vector_downwards(name, kind):
    model = ALEXNET if name == "alexnet" else models.build(name, (32, 32, 3), 10)
    buckets = choose_buckets(model, kind, bucket_bytes=100_000, ranks=3, global_batch=30)
    assert buckets[0].stop == model.num_parameters
    assert buckets[-1].start == 0
    assert all(upper.start == lower.stop for upper, lower in pairwise(buckets))
    assert [n for b in buckets for n in b.layers] == [x.name for x in reversed(model.layers) if x.parameters]
    assert all(len(bucket.layers) == 1 for bucket in buckets if bucket.kind == "factors")


def test_a_bucket_has_layers_of_one_kind():
    model = models.build("lenet5", (28, 28, 1), 10)
    names = [layer.name for layer in model.layers if layer.parameters]
    kinds = {name: ("sharded" if index % 2 else "allreduce") for index, name in enumerate(names)}
    buckets = make_buckets(model.layers, 10**9, kinds)
    assert [bucket.layers for bucket in buckets] == [(name,) for name in reversed(names)]
    assert all(kinds[bucket.layers[0]] == bucket.kind for bucket in buckets)


def test_on_one_rank_nothing_travels():
    for bucket in choose_buckets(ALEXNET, "auto", bucket_bytes=1, ranks=1, global_batch=8):
        assert () == bucket_loads(bucket, ALEXNET, "auto", 0, 1, 8)


def test_small_models_get_smaller_buckets_so_that_their_gradients_travel_during_backward():
    resnet = models.build("resnet20", (32, 32, 3), 10)
    for bucket_bytes, fewest, most in ((4_000_000, 6, 9), (10_000, 12, 23)):
        buckets = choose_buckets(resnet, "allreduce", bucket_bytes=bucket_bytes, ranks=4, global_batch=64)
        assert fewest <= len(buckets) <= most
    lenet = models.build("lenet5", (28, 28, 1), 10)
    buckets = choose_buckets(lenet, "allreduce", bucket_bytes=4_000_000, ranks=4, global_batch=64)
    assert all(4 * bucket.size >= 1 << 16 for bucket in buckets[:-1])


@pytest.mark.parametrize(("kind", "halved"), [("allreduce", 1.0), ("sharded", 0.5), ("factors", 0.5)])
def test_narrow_messages_halve_gradients_but_not_parameters(kind, halved):
    for bucket in choose_buckets(ALEXNET, kind, bucket_bytes=4_000_000, ranks=4, global_batch=32):
        wide = bucket_loads(bucket, ALEXNET, "ring", 0, 4, 32)
        narrow = bucket_loads(bucket, ALEXNET, "ring", 0, 4, 32, wire_bytes=2)
        for one, other in zip(wide, narrow, strict=True):
            assert other.num_bytes == (one.num_bytes if one.item == "parameters" else one.num_bytes / 2)
            assert other.messages == one.messages
        if bucket.kind == kind and kind != "factors":
            sums = [sum(load.num_bytes for load in some) for some in (wide, narrow)]
            assert sums[1] == pytest.approx((1 - halved / 2) * sums[0])


@pytest.mark.parametrize("kind", KINDS)
def test_lazy_layers_have_buckets_of_their_own(kind):
    resnet = models.build("resnet20", (32, 32, 3), 10)
    every = lazy_rounds(resnet, 3, 4)
    convolutions = [layer.name for layer in resnet.layers if isinstance(layer, ConvSpec)]
    assert set(convolutions[:3]) <= set(every)
    assert not set(convolutions[3:]) & set(every)
    assert {layer.name for layer in resnet.layers if isinstance(layer, BatchNormSpec)} & set(every)
    assert set(every.values()) == {4}
    buckets = choose_buckets(resnet, kind, bucket_bytes=10**9, ranks=4, global_batch=64, every=every)
    assert [bucket.every for bucket in buckets] == sorted(bucket.every for bucket in buckets)
    for bucket in buckets:
        assert all(every.get(name, 1) == bucket.every for name in bucket.layers)


def test_more_lazy_layers_than_there_are_convolutions_are_refused():
    with pytest.raises(PlanError, match=r"exchange.lazy_layers is 9 and alexnet has 5 convolutions"):
        lazy_rounds(ALEXNET, 9, 2)
    assert lazy_rounds(ALEXNET, 0, 2) == {}
    assert len(lazy_rounds(ALEXNET, 5, 2)) == 5
