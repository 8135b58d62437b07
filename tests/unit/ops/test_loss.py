"""Softmax cross entropy on each implementation, against the formula sample by sample."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.errors import ShapeError
from tests import reference
from tests.checks import assert_close, assert_grad


def draw(random, samples=7, classes=5, scale=3.0, dtype=np.float32):
    """Return logits and labels."""
    return (scale * random.standard_normal((samples, classes))).astype(dtype), random.integers(0, classes, samples)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("samples", "classes"), [(1, 1), (1, 10), (7, 5), (32, 1000)])
def test_loss_hits_and_gradient_equal_the_formula(implementation, random, samples, classes, smoothing):
    logits, labels = draw(random, samples, classes)
    expected = reference.softmax_cross_entropy(logits, labels, 40, smoothing)
    loss, hits, grad = ops.softmax_cross_entropy(logits, labels, global_batch=40, label_smoothing=smoothing)
    assert type(loss) is float
    assert type(hits) is int
    assert grad.dtype == np.float32
    assert expected[0] == pytest.approx(loss, rel=1e-6)
    assert expected[1] == hits
    assert_close(expected[2], grad, 1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient_agrees_with_central_differences(random, smoothing):
    logits, labels = draw(random, dtype=np.float64)
    options = {"global_batch": 7, "label_smoothing": smoothing}
    grad = ops.softmax_cross_entropy(logits, labels, **options)[2]
    assert_grad(lambda z: ops.softmax_cross_entropy(z, labels, **options)[0], logits, grad)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_stay_finite(implementation, size):
    logits = np.array([[size, -size, 0.0], [-size, size, size]], np.float32)
    loss, hits, grad = ops.softmax_cross_entropy(logits, np.array([0, 1]), global_batch=2)
    assert np.log(2) / 2 == pytest.approx(loss)
    assert hits == 2
    assert_close([[0, 0, 0], [0, -0.25, 0.25]], grad)
    loss, hits, _ = ops.softmax_cross_entropy(logits[:1], np.array([1]), global_batch=1)
    assert 2 * size == pytest.approx(loss, rel=1e-6)
    assert hits == 0


@pytest.mark.parametrize("cuts", [[3], [1, 2, 6]])
def test_shares_of_a_split_batch_add_up_to_the_whole(implementation, random, cuts):
    logits, labels = draw(random)
    whole = ops.softmax_cross_entropy(logits, labels, global_batch=7, label_smoothing=0.1)
    parts = [
        ops.softmax_cross_entropy(part, part_labels, global_batch=7, label_smoothing=0.1)
        for part, part_labels in zip(np.split(logits, cuts), np.split(labels, cuts), strict=True)
    ]
    losses, hits, grads = zip(*parts, strict=True)
    assert whole[0] == pytest.approx(sum(losses), rel=1e-12)
    assert whole[1] == sum(hits)
    np.testing.assert_array_equal(whole[2], np.concatenate(grads))


def test_of_equal_logits_the_first_counts_as_the_answer(implementation):
    logits = np.zeros((2, 3), np.float32)
    assert ops.softmax_cross_entropy(logits, np.array([0, 1]), global_batch=2)[1] == 1


def test_gradient_of_each_sample_sums_to_zero(implementation, random):
    logits, labels = draw(random, 16, 50)
    grad = ops.softmax_cross_entropy(logits, labels, global_batch=1, label_smoothing=0.3)[2]
    assert abs(grad.sum(axis=1)).max() < 1e-6


def test_logits_stay_as_they_are(implementation, random):
    logits, labels = draw(random)
    before = logits.copy()
    ops.softmax_cross_entropy(logits, labels, global_batch=7)
    np.testing.assert_array_equal(before, logits)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 5], {}, "labels run from 0 to 5; they must lie in 0 to 2"),
        ([-1, 2], {}, "labels run from -1 to 2"),
        ([0, 1, 2], {}, r"labels are int64 of shape \(3,\); they must be integers of shape \(2,\)"),
        ([0.0, 1.0], {}, "labels are float64"),
        ([0, 1], {"global_batch": 0}, r"global_batch \(=0\) must be at least 1"),
        ([0, 1], {"label_smoothing": 1.0}, r"label_smoothing \(=1.0\) at least 0 and below 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(labels, options, message):
    with pytest.raises(ShapeError, match=message):
        ops.softmax_cross_entropy(np.zeros((2, 3)), np.array(labels), **{"global_batch": 2} | options)
