"""Buckets cover the flat gradient vector, in the order in which backward completes it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hpcnn.nn import models
from hpcnn.plan.buckets import FLOAT_BYTES, make_buckets


@pytest.mark.parametrize("bucket_bytes", [1, 1000, 100_000, 10**9])
@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_buckets_cover_every_parameter_once_from_the_last_layer_down(name: str, bucket_bytes: int) -> None:
    shape = (28, 28, 1) if name == "lenet5" else (32, 32, 3)
    spec = models.build(name, shape, 10)
    buckets = make_buckets(spec.layers, bucket_bytes)
    assert buckets[0].stop == spec.num_parameters
    assert buckets[-1].start == 0
    assert all(first.start == second.stop for first, second in pairwise(buckets))
    named = [layer for bucket in buckets for layer in bucket.layers]
    assert named == [layer.name for layer in reversed(spec.layers) if layer.parameters]


def test_a_bucket_closes_with_the_layer_that_fills_it_or_takes_half_of_what_was_left() -> None:
    spec = models.build("resnet20", (32, 32, 3), 10)
    sizes = {layer.name: layer.num_parameters for layer in spec.layers}
    buckets = make_buckets(spec.layers, 300_000)
    for bucket in buckets[:-1]:
        full = min(300_000, max(bucket.stop * FLOAT_BYTES / 2, 65_536))
        assert bucket.size * FLOAT_BYTES >= full
        assert (bucket.size - sizes[bucket.layers[-1]]) * FLOAT_BYTES < full
    assert [round(bucket.size * FLOAT_BYTES / 1e3) for bucket in buckets] == [447, 370, 148, 74, 39]


def test_what_backward_completes_last_is_short() -> None:
    layers = models.build("vgg16-32", (32, 32, 3), 10).layers
    sizes = [bucket.size * FLOAT_BYTES for bucket in make_buckets(layers, 4_000_000)]
    assert sizes[-1] < 65_536
    assert all(second < 0.6 * first for first, second in pairwise(sizes[-5:]))


def test_a_model_without_parameters_has_no_buckets() -> None:
    assert make_buckets((), 100) == ()
