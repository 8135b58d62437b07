"""Entropies of kernel matrices: their bounds, and identities that hold exactly."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.analysis.entropy import (
    centred_products,
    dual_total_correlation,
    entropy,
    entropy_with_labels,
    kernel,
    label_entropy,
    mean_off_diagonal,
    squared_distances,
    total_correlation,
)

ORDERS = (0.5, 1.0, 1.01, 2.0, 3.0)
N = 64


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def direct(matrix: np.ndarray, alpha: float) -> float:
    """Return the entropy by the definition, with singular values of the normalised matrix."""
    scale = np.sqrt(np.outer(np.diag(matrix), np.diag(matrix)))
    p = np.linalg.svd(matrix / scale / len(matrix), compute_uv=False)
    p = p[p > 1e-15]
    return -np.sum(p * np.log(p)) / np.log(2) if alpha == 1 else np.log(np.sum(p**alpha)) / np.log(2) / (1 - alpha)


def gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    """Return the kernel matrix, a pair at a time."""
    return np.array([[np.exp(-np.sum((a - b) ** 2) / (2 * sigma**2)) for b in x] for a in x])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distances_are_those_of_pairs(rng: np.random.Generator, dtype: type) -> None:
    x = (rng.normal(size=(20, 7)) + 100).astype(dtype)
    expected = ((x[:, None].astype(float) - x[None].astype(float)) ** 2).sum(-1)
    actual = squared_distances(centred_products(x))
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, atol=1e-4 if dtype is np.float32 else 1e-11)
    np.testing.assert_array_equal(actual, actual.T)


@pytest.mark.parametrize("alpha", ORDERS)
def test_entropy_is_that_of_the_definition_and_within_its_bounds(rng: np.random.Generator, alpha: float) -> None:
    for sigma in (0.3, 1.0, 5.0):
        matrix = gaussian(rng.normal(size=(N, 3)), sigma)
        value = entropy(matrix, alpha)
        assert value == pytest.approx(direct(matrix, alpha), abs=1e-5)
        assert 0 < value < np.log2(N)
    assert entropy(np.ones((N, N)), alpha) == pytest.approx(0, abs=1e-5)
    assert entropy(np.eye(N), alpha) == pytest.approx(np.log2(N), abs=1e-12)


def test_order_two_is_the_frobenius_norm_and_what_eigenvalues_give(rng: np.random.Generator) -> None:
    matrix = gaussian(rng.normal(size=(N, 3)), 1.0)
    p = np.linalg.eigvalsh(matrix) / N
    assert entropy(matrix, 2.0) == pytest.approx(-np.log2(np.sum(p * p)), rel=1e-12)
    assert entropy(matrix, 2.0) == pytest.approx(-2 * np.log2(np.linalg.norm(matrix / N)), rel=1e-12)


def test_order_one_is_the_limit(rng: np.random.Generator) -> None:
    matrix = gaussian(rng.normal(size=(N, 3)), 1.0)
    assert entropy(matrix, 1 + 1e-6) == pytest.approx(entropy(matrix, 1.0), rel=1e-5)


def test_the_product_of_kernels_is_the_kernel_of_summed_exponents(rng: np.random.Generator) -> None:
    xs, sigmas = rng.normal(size=(5, N, 4)), (0.5, 1.0, 2.0, 3.0, 0.7)
    product = np.prod([gaussian(x, sigma) for x, sigma in zip(xs, sigmas, strict=True)], axis=0)
    exponents = sum(
        squared_distances(centred_products(x)) / (2 * sigma**2) for x, sigma in zip(xs, sigmas, strict=True)
    )
    assert entropy(kernel(exponents), 1.01) == pytest.approx(entropy(product, 1.01), rel=1e-12)


@pytest.mark.parametrize("alpha", ORDERS)
def test_labels_are_one_hot_vectors_seen_through_a_narrow_kernel(rng: np.random.Generator, alpha: float) -> None:
    labels = rng.integers(10, size=N)
    one_hot = gaussian(np.eye(10)[labels], 0.1)
    matrix = gaussian(rng.normal(size=(N, 3)), 1.0)
    assert label_entropy(labels, alpha) == pytest.approx(entropy(one_hot, alpha), abs=1e-5)
    assert entropy_with_labels(matrix, labels, alpha) == pytest.approx(entropy(matrix * one_hot, alpha), abs=1e-5)
    # I(Y; Y) = S(Y) + S(Y) - S(Y, Y) = S(Y)
    assert entropy_with_labels(one_hot, labels, alpha) == pytest.approx(label_entropy(labels, alpha), abs=1e-5)


def test_label_entropy_of_order_one_is_shannons(rng: np.random.Generator) -> None:
    labels = rng.integers(10, size=N)
    shares = [np.mean(labels == label) for label in range(10)]
    assert label_entropy(labels, 1.0) == pytest.approx(-sum(p * np.log2(p) for p in shares if p), rel=1e-12)


def test_continuous_data_share_more_with_themselves_than_nothing_but_not_all(rng: np.random.Generator) -> None:
    matrix = gaussian(rng.normal(size=(128, 5)), 3.0)
    own = entropy(matrix, 1.01)
    assert 0 < 2 * own - entropy(matrix * matrix, 1.01) < own


def test_joint_entropy_of_many_independent_maps_saturates(rng: np.random.Generator) -> None:
    total, joint = np.zeros((128, 128)), {}
    for count in range(1, 17):
        distances = squared_distances(centred_products(rng.normal(size=(128, 20))))
        total += distances / (2 * np.median(distances[distances > 0]))
        joint[count] = entropy(kernel(total), 1.01)
    assert joint[1] < 6.3 < 6.9 < joint[8] < joint[16] <= 7
    assert joint[16] > 0.999 * 7


def test_functions_of_a_variable_share_less_with_it_step_by_step(rng: np.random.Generator) -> None:
    """A Markov chain: images of three numbers, then two of them, then one, then its sign."""
    labels = np.repeat(np.arange(4), N // 4)
    x = rng.normal(size=(N, 3)) + 4 * np.eye(4)[labels][:, :3]
    stages = [x, x[:, :2], x[:, :1], np.sign(x[:, :1])]
    kx = gaussian(x, 1.0)
    shared = []
    for stage in stages:
        k = gaussian(stage, 1.0)
        shared.append(entropy(kx, 1.01) + entropy(k, 1.01) - entropy(kx * k, 1.01))
    assert shared == sorted(shared, reverse=True)
    assert shared[0] > shared[-1] + 0.3


def test_total_correlations_of_copies_and_of_strangers() -> None:
    labels = np.arange(16)
    a, b = labels // 4, labels % 4  # two independent uniform variables of two bits each
    kernels = [np.equal.outer(one, one).astype(float) for one in (a, b)]
    single = np.array([entropy(k, 1.0) for k in kernels])
    joint = entropy(kernels[0] * kernels[1], 1.0)
    np.testing.assert_allclose([*single, joint], [2, 2, 4], atol=1e-9)
    assert total_correlation(single, joint) == pytest.approx((0, 0), abs=1e-9)
    assert dual_total_correlation(single[::-1], joint) == pytest.approx((0, 0), abs=1e-9)
    assert total_correlation(np.array([2.0, 2.0]), 2.0) == pytest.approx((2, 1))
    assert dual_total_correlation(np.array([2.0, 2.0]), 2.0) == pytest.approx((2, 1))


def test_what_is_no_number_stays_none() -> None:
    matrix = np.eye(4)
    matrix[0, 1] = matrix[1, 0] = np.nan
    assert np.isnan(entropy(matrix, 1.01))
    assert np.isnan(entropy_with_labels(matrix, np.zeros(4, int), 2.0))


def test_mean_off_diagonal() -> None:
    assert mean_off_diagonal(np.array([[5.0, 1.0], [3.0, 7.0]])) == 2
    assert mean_off_diagonal(np.array([[5.0]])) == 0


def test_products_over_squared_widths_add_up_to_exponents(rng: np.random.Generator) -> None:
    xs, sigmas = rng.normal(size=(3, N, 4)) + 5, (0.5, 1.0, 2.0)
    total = sum(centred_products(x) / sigma**2 for x, sigma in zip(xs, sigmas, strict=True))
    product = np.prod([gaussian(x, sigma) for x, sigma in zip(xs, sigmas, strict=True)], axis=0)
    np.testing.assert_allclose(kernel(squared_distances(total) / 2), product, rtol=1e-10)
