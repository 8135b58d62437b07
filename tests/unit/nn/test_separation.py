"""Terms of the loss that depend on features: gradients, blocks of a batch, running matrices, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hpcnn.config import SeparationConfig
from hpcnn.errors import ConfigError
from hpcnn.nn import models
from hpcnn.nn.context import StepContext
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.nn.separation import (
    BASIS,
    MATRICES,
    THRESHOLD,
    ClassMatrices,
    FeatureLoss,
    RejectionMargin,
    SubspaceSeparation,
    spectra,
)
from hpcnn.spec import ModelSpec
from tests.checks import assert_close, assert_grad

Make = Callable[[], FeatureLoss]


def two_layers(features: int, classes: int) -> ModelSpec:
    graph = GraphBuilder("two", (2, 2, 1))
    graph.flatten("flatten")
    graph.linear("hidden", features)
    graph.linear("last", classes)
    return graph.finish(classes)


def context(samples: int, step: int = 0) -> StepContext:
    return StepContext(training=True, seed=1, step=step, samples=np.arange(samples), global_batch=samples)


def nothing(_: np.ndarray) -> None:
    """Sum over one rank."""


def make(kind: type, classes: int = 3, reduce_sum: Callable[[np.ndarray], None] = nothing, **settings: Any) -> Any:
    settings = {"dimension": 2, "weight": 1.7, "eta": 0.3} | settings
    return kind(two_layers(10, classes), SeparationConfig(**settings), reduce_sum)


def batch(classes: int, samples: int = 13, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    return draw.standard_normal((samples, 10)) + 2 * draw.standard_normal((classes, 10))[labels], labels


def after_one_step(kind: type, classes: int, **settings: Any) -> Any:
    head = make(kind, classes, **settings)
    head.forward(*batch(classes, seed=1), context(13))
    return head


@pytest.mark.parametrize("method", ["geodesic", "chordal"])
def test_gradient_of_the_separation_is_that_through_the_batch(method: str) -> None:
    features, labels = batch(3)
    before = after_one_step(SubspaceSeparation, 3, method=method).statistics[MATRICES].copy()
    head = make(SubspaceSeparation, 3, method=method)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        head.statistics[MATRICES][...] = before
        return head.forward(x, labels, context(13, 1))

    ways = np.random.default_rng(7).standard_normal((8, *features.shape))
    grad = np.tensordot(ways, value(features)[1], 2)
    assert_grad(lambda x: value(features + np.tensordot(x, ways, 1))[0], np.zeros(8), grad, 2e-6)


@pytest.mark.parametrize("margin", [0.9, 0.6])
def test_gradient_of_the_rejections_with_projections_held(margin: float) -> None:
    features, labels = batch(2)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        head = after_one_step(RejectionMargin, 2, method="rejection", margin=margin, refresh=5)
        return head.forward(x, labels, context(13, 1))

    found = value(features)
    assert found[0] > 0.01
    assert_grad(lambda x: value(x)[0], features, found[1], 1e-6)


@pytest.mark.parametrize(
    ("kind", "settings"), [(SubspaceSeparation, {"method": "chordal"}), (RejectionMargin, {"method": "rejection"})]
)
def test_order_of_the_samples_does_not_matter(kind: type, settings: dict[str, Any]) -> None:
    classes = 2 if kind is RejectionMargin else 3
    features, labels = batch(classes)
    order = np.random.default_rng(4).permutation(13)
    one, other = after_one_step(kind, classes, **settings), after_one_step(kind, classes, **settings)
    value, grad = one.forward(features, labels, context(13, 1))
    other_value, other_grad = other.forward(features[order], labels[order], context(13, 1))
    assert abs(value - other_value) < 1e-12
    assert_close(grad[order], other_grad, 1e-9)
    assert_close(one.statistics[MATRICES], other.statistics[MATRICES], 1e-12)


def test_features_of_any_shape_and_type_get_gradients_of_the_same() -> None:
    features, labels = batch(3)
    images = features.astype(np.float32).reshape(13, 5, 1, 2)
    grad = after_one_step(SubspaceSeparation, 3, method="chordal").forward(images, labels, context(13, 1))[1]
    expected = after_one_step(SubspaceSeparation, 3, method="chordal").forward(features, labels, context(13, 1))[1]
    assert grad.dtype == np.float32
    assert_close(expected.reshape(images.shape), grad, 1e-4)


def test_running_matrices_take_in_each_class_and_keep_those_that_a_batch_lacks() -> None:
    matrices = ClassMatrices(3, 2, 0.25, nothing)
    x = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    slopes = matrices.update(x, np.array([0, 0, 1]))
    assert_close([[0.5, 0, 0.5], [0.36, 0.48, 0.64], [0, 0, 0]], matrices.packed, 1e-12)
    assert slopes.tolist() == [0.5, 1.0, 0.0]
    slopes = matrices.update(x[:1], np.array([1]))
    assert_close([[0.5, 0, 0.5], [0.75 * 0.36 + 0.25, 0.36, 0.48], [0, 0, 0]], matrices.packed, 1e-12)
    assert slopes.tolist() == [0.0, 0.25, 0.0]
    assert [cut.dimension for cut in spectra(matrices.packed, 2, 0.0)] == [2, 2, 0]


def test_matrices_are_summed_over_blocks_in_one_message() -> None:
    sums: list[np.ndarray] = []
    head = make(SubspaceSeparation, 3, reduce_sum=sums.append, method="geodesic")
    head.forward(*batch(3), context(13))
    assert [one.shape for one in sums] == [(3, 56)]  # 10 * 11 / 2 numbers and a count for each class


def test_a_block_without_samples_takes_part() -> None:
    head = make(SubspaceSeparation, 3, method="geodesic")
    share, grad = head.forward(np.zeros((0, 10)), np.zeros(0, int), context(13))
    assert (share, grad.shape) == (0.0, (0, 10))


def test_between_refreshes_there_is_no_term_and_no_message() -> None:
    sums: list[np.ndarray] = []
    head = make(SubspaceSeparation, 3, reduce_sum=sums.append, method="geodesic", refresh=3)
    found = [head.forward(*batch(3, seed=step), context(13, step)) for step in range(4)]
    assert [grad is None for _, grad in found] == [False, True, True, False]
    assert [share > 0 for share, _ in found] == [True, False, False, True]
    assert len(sums) == 2


def test_without_weight_subspaces_are_followed_and_nothing_else_is_done() -> None:
    head, other = make(SubspaceSeparation, 3, method="geodesic", weight=0.0), make(SubspaceSeparation, 3)
    assert head.forward(*batch(3), context(13)) == (0.0, None)
    other.forward(*batch(3), context(13))
    assert np.array_equal(head.statistics[MATRICES], other.statistics[MATRICES])


def test_projections_are_refreshed_as_often_as_asked() -> None:
    head = make(RejectionMargin, 2, method="rejection", refresh=2)
    bases = []
    for step in range(4):
        head.forward(*batch(2, seed=step), context(13, step))
        bases.append(head.statistics[BASIS].copy())
    assert [np.array_equal(one, other) for one, other in pairwise(bases)] == [True, False, True]


@pytest.mark.parametrize(("kind", "classes"), [(SubspaceSeparation, 3), (RejectionMargin, 2)])
def test_features_that_are_no_numbers_give_a_loss_that_is_none(kind: type, classes: int) -> None:
    features, labels = batch(classes)
    features[3, 3] = np.nan
    share, grad = make(kind, classes).forward(features, labels, context(13))
    assert np.isnan(share)
    assert grad is None


def test_a_descent_step_separates() -> None:
    for method in ("geodesic", "chordal"):
        features, labels = batch(3, samples=60)
        values = []
        for _ in range(30):
            head = make(SubspaceSeparation, 3, method=method, eta=1.0)
            value, grad = head.forward(features, labels, context(60, 0))
            values.append(value)
            features = features - 30 * grad
        assert values[-1] < 0.8 * values[0], method


@pytest.mark.parametrize("method", ["geodesic", "chordal"])
def test_dead_loss_is_refused_with_its_numbers_and_the_fix(method: str) -> None:
    config = SeparationConfig(method=method, dimension=9)
    with pytest.raises(ConfigError) as caught:
        SubspaceSeparation(models.build("lenet5", (28, 28, 1), 10), config, nothing)
    words = str(caught.value)
    assert "'separation.dimension' (=9)" in words
    assert "the 84 features of layer 'fc2'" in words
    assert "10 classes times 9 dimensions (=90)" in words
    assert "at most 8" in words
    SubspaceSeparation(models.build("lenet5", (28, 28, 1), 10), SeparationConfig(method=method, dimension=8), nothing)


def test_what_else_is_refused() -> None:
    lenet = models.build("lenet5", (28, 28, 1), 10)
    with pytest.raises(ConfigError, match=r"'separation.layer' \(='fc3'\) must be a layer of 'lenet5' before the last"):
        SubspaceSeparation(lenet, SeparationConfig(layer="fc3"), nothing)
    with pytest.raises(ConfigError, match="trains networks of two answers, this one has 10"):
        RejectionMargin(lenet, SeparationConfig(method="rejection"), nothing)
    with pytest.raises(ConfigError, match=r"'separation.dimension' \(=10\) must be below the 10 features"):
        make(RejectionMargin, 2, dimension=10)
    with pytest.raises(ConfigError, match="second moments of 1000 classes in the 4096 features"):
        SubspaceSeparation(models.build("vgg16", (224, 224, 3), 1000), SeparationConfig(dimension=2), nothing)


def test_layer_of_the_features_may_be_chosen() -> None:
    lenet = models.build("lenet5", (28, 28, 1), 10)
    head = SubspaceSeparation(lenet, SeparationConfig(layer="fc1"), nothing)
    assert (head.layer, head.statistics[MATRICES].shape) == ("fc1", (10, 120 * 121 // 2))


def test_state_of_a_network_of_one_class_has_a_threshold() -> None:
    head = make(RejectionMargin, 2, method="rejection")
    assert {name: value.shape for name, value in head.statistics.items()} == {
        MATRICES: (1, 55),
        BASIS: (10, 2),
        THRESHOLD: (1,),
    }
