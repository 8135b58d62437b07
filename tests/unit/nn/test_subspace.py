"""Subspaces of features: measures against constructed angles, gradients against central differences, the test rule."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.nn import subspace
from tests.checks import assert_close, assert_grad


def moments(classes: int, size: int, samples: int = 9, seed: int = 0) -> np.ndarray:
    """Return second moments of random features, (classes, size, size)."""
    draw = np.random.default_rng(seed)
    features = draw.standard_normal((classes, samples, size)) * np.linspace(2.0, 0.5, size)
    return np.einsum("kni,knj->kij", features, features) / samples


def orthogonal(size: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


@pytest.mark.parametrize("angles", [(0.3, 1.1), (1e-9, 0.2), (0.0, np.pi / 2), (np.pi / 2, np.pi / 2)])
def test_principal_angles_are_those_that_the_subspaces_were_built_with(angles: tuple[float, float]) -> None:
    e = orthogonal(7)
    one = e[:, :2] @ orthogonal(2, 1)
    other = (e[:, :2] * np.cos(angles) + e[:, 2:4] * np.sin(angles)) @ orthogonal(2, 2)
    np.testing.assert_allclose(subspace.principal_angles(one, other), angles, atol=1e-14)


def test_angle_matrix_holds_the_smallest_angles_in_degrees() -> None:
    e = orthogonal(6)
    turned = (e[:, 1] * np.cos(0.5) + e[:, 2] * np.sin(0.5))[:, None]
    angles = subspace.angle_matrix([e[:, :2], turned, e[:, :0]])
    assert_close([[0, np.degrees(0.5), 0], [np.degrees(0.5), 0, 0], [0, 0, 0]], angles, 1e-12)


def test_rejection_is_what_projecting_leaves() -> None:
    e = orthogonal(5)
    directions = np.stack([e[:, 0], e[:, 3], 0.6 * e[:, 1] + 0.8 * e[:, 4]])
    assert_close([[0, 1], [1, 0], [0.8, 1]], subspace.rejections(directions, [e[:, :2], e[:, 2:4]]), 1e-12)


def test_random_directions_are_rejected_as_dimensions_are_missing() -> None:
    draw = np.random.default_rng(3)
    directions, _ = subspace.unit(draw.standard_normal((20000, 16)))
    rejected = subspace.rejections(directions, [orthogonal(16)[:, :4]])
    assert abs(np.mean(rejected**2) - (1 - 4 / 16)) < 0.005


def test_gradient_of_a_rejection_through_the_norm_of_the_feature() -> None:
    basis, features = orthogonal(6)[:, :2], np.random.default_rng(1).standard_normal((4, 6))

    def total(x: np.ndarray) -> float:
        return float(np.sum(subspace.rejections(subspace.unit(x)[0], [basis]) ** 2))

    directions, norms = subspace.unit(features)
    rest = 2 * (directions - directions @ basis @ basis.T)
    assert_grad(total, features, subspace.unit_backward(rest, directions, norms), 1e-8)


def test_a_feature_of_zeros_has_no_direction_and_no_gradient() -> None:
    directions, norms = subspace.unit(np.zeros((1, 3)))
    assert not directions.any()
    assert not subspace.unit_backward(np.ones((1, 3)), directions, norms).any()


@pytest.mark.parametrize("measure", ["geodesic", "chordal"])
@pytest.mark.parametrize(("classes", "dimension", "energy"), [(3, 2, 0.0), (4, 1, 0.0), (3, 3, 0.5)])
def test_gradient_of_the_separation(measure: str, classes: int, dimension: int, energy: float) -> None:
    def cuts(matrices: np.ndarray) -> list[subspace.Spectrum]:
        return [subspace.spectrum(0.5 * (one + one.T), dimension, energy) for one in matrices]

    matrices = moments(classes, 11)
    if energy:
        matrices[0] += 40 * np.outer(orthogonal(11)[0], orthogonal(11)[0])
        assert len({cut.dimension for cut in cuts(matrices)}) > 1  # or it would be the case before
    found = subspace.separation(cuts(matrices), measure)
    assert 0.05 < found.value < 0.95
    ways = np.random.default_rng(7).standard_normal((6, *matrices.shape))
    assert_grad(
        lambda x: subspace.separation(cuts(matrices + np.tensordot(x, ways, 1)), measure).value,
        np.zeros(len(ways)),
        np.tensordot(ways, found.gradients, 3),
        1e-6,
    )


@pytest.mark.parametrize("measure", ["geodesic", "chordal"])
def test_separation_is_nought_at_right_angles_and_one_for_equal_subspaces(measure: str) -> None:
    e = orthogonal(8)
    apart = [subspace.spectrum(e[:, 2 * k : 2 * k + 2] @ e[:, 2 * k : 2 * k + 2].T, 2) for k in range(3)]
    found = subspace.separation(apart, measure)
    assert abs(found.value) < 1e-12
    assert np.abs(found.gradients).max() < 1e-6
    assert abs(subspace.separation([apart[0], apart[0]], measure).value - 1) < 1e-12


@pytest.mark.parametrize("measure", ["geodesic", "chordal"])
def test_separation_does_not_depend_on_the_order_of_the_classes(measure: str) -> None:
    matrices, order = moments(4, 12), [2, 0, 3, 1]
    one = subspace.separation([subspace.spectrum(matrix, 2) for matrix in matrices], measure)
    other = subspace.separation([subspace.spectrum(matrix, 2) for matrix in matrices[order]], measure)
    assert abs(one.value - other.value) < 1e-12
    assert_close(one.gradients[order], other.gradients, 1e-9)


def test_a_class_that_was_never_seen_is_left_out() -> None:
    matrices = moments(3, 9)
    two = subspace.separation([subspace.spectrum(matrix, 2) for matrix in matrices[:2]], "chordal")
    three = subspace.separation(
        [subspace.spectrum(matrix, 2) for matrix in (*matrices[:2], np.zeros((9, 9)))], "chordal"
    )
    assert two.value == three.value
    assert np.array_equal(two.gradients, three.gradients[:2])
    assert not three.gradients[2].any()


@pytest.mark.parametrize("measure", ["geodesic", "chordal"])
def test_sum_of_others_that_fills_the_space_leaves_no_loss_to_lower(measure: str) -> None:
    found = subspace.separation([subspace.spectrum(matrix, 2) for matrix in moments(4, 6)], measure)
    assert abs(found.value - 1) < 1e-6
    assert np.abs(found.gradients).max() < 1e-6


def test_a_matrix_of_few_samples_has_no_more_dimensions_than_those() -> None:
    assert subspace.spectrum(moments(1, 8, samples=2)[0], 4).dimension == 2
    assert subspace.spectrum(np.zeros((8, 8)), 4).dimension == 0


def test_energy_takes_the_fewest_dimensions_that_hold_it() -> None:
    matrix = np.diag([5.0, 3.0, 1.5, 0.5])
    assert [subspace.spectrum(matrix, 3, energy).dimension for energy in (0.4, 0.6, 0.9, 0.99)] == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("rejected", "known", "open_set"),
    [
        ((0.1, 0.5, 0.9), 0, 0),  # one candidate
        ((0.5, 0.35, 0.9), 1, 1),  # the one candidate, of a share of 0.875
        ((0.25, 0.30, 0.9), 0, 0),  # two candidates, shares of 0.625 and 0.75
        ((0.39, 0.30, 0.9), 1, 1),  # two candidates, and the smaller rejection is not the smaller share
        ((0.30, 0.35, 0.1), 2, 2),  # three candidates, shares of 0.75, 0.875 and 0.5
        ((0.8, 0.6, 0.9), 1, -1),  # none: nearest, or unknown
        ((0.4, 0.9, 0.9), 0, 0),  # a threshold belongs to its class
    ],
)
def test_test_rule(rejected: tuple[float, ...], known: int, open_set: int) -> None:
    thresholds, row = np.array([0.4, 0.4, 0.2]), np.array([rejected])
    assert subspace.decide(row, thresholds).tolist() == [known]
    assert subspace.decide(row, thresholds, unknown=True).tolist() == [open_set]


def test_threshold_has_the_least_balanced_error_of_all() -> None:
    draw = np.random.default_rng(0)
    for case in range(30):
        own = np.arange(40) < 5 + case
        rejected = np.round(draw.normal(0.3 + 0.2 * ~own, 0.15), 1 + case % 2)  # with many equals

        def error(t: float, rejected: np.ndarray = rejected, own: np.ndarray = own) -> float:
            return 0.5 * (np.mean(rejected[own] > t) + np.mean(rejected[~own] <= t))

        best = min(error(t) for t in (*rejected, rejected.min() - 1))
        assert error(subspace.fit_threshold(rejected, own)) <= min(best, 0.5) + 1e-12


def test_threshold_of_separable_rejections_lies_between_them() -> None:
    found = subspace.fit_threshold(np.array([0.9, 0.1, 0.2, 0.8]), np.array([False, True, True, False]))
    assert found == pytest.approx(0.5)
