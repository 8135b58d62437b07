"""Rules for kernel widths, against formulas written another way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hpcnn.analysis.entropy import centred_products, entropy, kernel
from hpcnn.analysis.widths import WidthRule, alignment, exponent, inverse_square

X = np.random.default_rng(3).normal(size=(40, 6)) * 0.01 + 2.0
PRODUCTS = centred_products(X)
PAIRS = [np.linalg.norm(a - b) for a, b in itertools.combinations(X, 2)]


def test_silverman_is_in_units_of_the_spread() -> None:
    spread = np.sqrt(X.var(axis=0, ddof=1).sum())
    assert WidthRule("silverman").width(PRODUCTS, 6) == pytest.approx(spread * 40 ** (-1 / 10), rel=1e-9)


@pytest.mark.parametrize("quantile", [0.05, 0.5])
def test_quantile_is_that_of_pairs(quantile: float) -> None:
    rule = WidthRule("quantile", quantile=quantile)
    assert rule.width(PRODUCTS, 6) == pytest.approx(np.quantile(PAIRS, quantile), rel=0.01)


def test_quantile_looks_at_samples_that_differ() -> None:
    x = np.zeros((40, 1))
    x[:4, 0] = 1, 2, 3, 4
    assert WidthRule("quantile").width(centred_products(x), 1) >= 1


def test_fixed_is_what_was_asked_for() -> None:
    rule = WidthRule("fixed", scale=8.0)
    width = rule.scale * rule.width(PRODUCTS, 6)
    expected = [[np.sum((a - b) ** 2) / 128 for b in X] for a in X]
    np.testing.assert_allclose(exponent(PRODUCTS, width), expected, atol=1e-15)


def test_alignment_beats_its_neighbours_and_is_smoothed() -> None:
    labels = np.repeat(np.arange(4), 10)
    same = np.equal.outer(labels, labels).astype(float)
    products = centred_products(X + 0.05 * np.eye(6)[labels])
    rule = WidthRule("alignment")
    best = rule.width(products, 6, same)

    def score(width: float) -> float:
        return alignment(kernel(exponent(products, width)), same)

    assert all(score(best) > score(best * factor) for factor in (0.7, 0.8, 1.25, 1.4))
    assert rule.width(products, 6, same, last=1.0) == pytest.approx(0.9 + 0.1 * best)
    assert alignment(same, same) == pytest.approx(1)


@pytest.mark.parametrize("rule", ["silverman", "quantile", "alignment"])
def test_samples_that_are_all_alike_say_nothing(rule: str) -> None:
    products = np.zeros((8, 8))
    width = WidthRule(rule).width(products, 3, np.eye(8))
    assert width == 0 == inverse_square(width)
    assert entropy(kernel(exponent(products, width)), 1.01) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rule", ["silverman", "quantile"])
def test_widths_follow_the_data(rule: str) -> None:
    assert WidthRule(rule).width(1e-10 * PRODUCTS, 6) == pytest.approx(1e-5 * WidthRule(rule).width(PRODUCTS, 6))


def test_too_narrow_a_kernel_makes_everything_distinct() -> None:
    narrow = exponent(PRODUCTS, 1e-4)
    assert entropy(kernel(narrow), 1.01) == pytest.approx(np.log2(40), rel=1e-9)
