"""The operator benchmark: what it covers, how it counts, and that the peer computes the same."""

import numpy as np
import pytest

from hpcnn.analysis import bench_ops as bench
from hpcnn.nn import models
from hpcnn.spec import BatchNormSpec, ConvSpec, PoolSpec


def flattened(result):
    """Arrays of a result, in our layout; what a maximum came from is told in different ways and left out."""
    parts = result if isinstance(result, tuple | list) else (result,)
    arrays = []
    for part in parts:
        if part is None or getattr(part, "dtype", None) == np.uint8 or "int64" in str(getattr(part, "dtype", "")):
            continue
        array = np.asarray(part)
        arrays.append(array.transpose(0, 2, 3, 1) if array.ndim == 4 and not isinstance(part, np.ndarray) else array)
    return arrays


def test_every_operation_of_a_model_is_timed_and_counted():
    rows = bench.bench_ops(["resnet20"], batch=2, repeats=1, peer=False)
    layers = models.build("resnet20", (32, 32, 3), 10).layers
    counts = {kind: sum(row.count for row in rows if row.kind == kind) for kind in {row.kind for row in rows}}
    convolutions = sum(isinstance(layer, ConvSpec) for layer in layers)
    assert convolutions == counts["conv2d"] == counts["conv2d weight gradient"]
    assert convolutions - 1 == counts["conv2d input gradient"]
    assert sum(isinstance(layer, BatchNormSpec) for layer in layers) == counts["batchnorm gradient"]
    assert all(row.median_s >= row.fastest_s > 0 for row in rows)
    assert 2 * sum(layer.forward_flops for layer in layers) == sum(
        row.count * row.flops for row in rows if row.kind in ("conv2d", "linear")
    )
    text = bench.format_table(rows)
    assert "2x32x32x16 -> 16, 3x3 /1" in text
    assert "PyTorch" in text.splitlines()[0]


def test_geometric_mean_weighs_a_layer_by_how_often_it_occurs():
    def row(count, own, peer):
        return bench.OpTime(
            kind="conv2d", layer="", count=count, flops=1, num_bytes=1, median_s=own, fastest_s=own,
            peer_median_s=peer, peer_fastest_s=peer,
        )  # fmt: skip

    assert pytest.approx(4.0) == bench.geometric_mean([row(3, 1.0, 8.0), row(3, 1.0, 2.0)])
    assert pytest.approx(2.0) == bench.geometric_mean([row(1, 1.0, 16.0), row(3, 1.0, 1.0)])
    assert bench.geometric_mean([row(1, 1.0, None)]) is None


@pytest.mark.parametrize(
    ("name", "size"), [("resnet20", (32, 32, 3)), ("alexnet", (67, 67, 3)), ("lenet5", (28, 28, 1))]
)
def test_the_peer_computes_the_same(name, size):
    pytest.importorskip("torch")
    bench.torch_ops.set_num_threads(1)
    compared = 0
    for layer in {bench._anonymous(layer): None for layer in models.build(name, size, 10).layers}:
        for case in bench._cases(layer, 2):
            mine, theirs = flattened(case.own()), flattened(case.prepare_peer()())
            if "weight gradient" in case.kind:
                assert len(theirs) == len(mine), case.kind
            for expected, actual in zip(theirs, mine):
                assert expected.shape == actual.shape, case.kind
                np.testing.assert_allclose(expected, actual, rtol=2e-3, atol=1e-3 * np.abs(expected).max())
            compared += 1
    assert compared > 10


def test_average_pools_are_timed_too():
    layer = PoolSpec(name="", inputs=("",), input_shape=(8, 8, 4), kind="average", window=(2, 2), stride=(2, 2))
    assert ["average pool", "average pool gradient"] == [case.kind for case in bench._cases(layer, 2)]
