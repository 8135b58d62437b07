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


def test_all_buckets_but_the_last_reach_the_asked_size_and_none_could_close_a_layer_earlier() -> None:
    spec = models.build("resnet20", (32, 32, 3), 10)
    sizes = {layer.name: layer.num_parameters for layer in spec.layers}
    for bucket in make_buckets(spec.layers, 50_000)[:-1]:
        assert bucket.size * FLOAT_BYTES >= 50_000
        assert (bucket.size - sizes[bucket.layers[-1]]) * FLOAT_BYTES < 50_000


def test_a_model_without_parameters_has_no_buckets() -> None:
    assert make_buckets((), 100) == ()
