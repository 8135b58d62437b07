"""Weights of replicas: a simplex, whoever is who, and the limits that the rules have."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from hpcnn.config import AverageConfig
from hpcnn.train.rules.weights import UNITS, Scores, shares, smoothed, weights

RULES = ("equal", "size", "accuracy", "inverse-loss", "softmax", "best")


def scores(loss: list[float], accuracy: list[float] | None = None, images: list[float] | None = None) -> Scores:
    size = len(loss)
    return Scores(np.array(loss), np.array(accuracy or [0.5] * size), np.array(images or [100.0] * size))


def random_scores(size: int, seed: int) -> Scores:
    draw = np.random.default_rng(seed)
    return Scores(
        draw.uniform(0.1, 3.0, size), draw.uniform(0.0, 1.0, size), draw.integers(1, 5000, size).astype(float)
    )


def chosen(rule: str, given: Scores, floor: float = 0.1) -> list[float]:
    return weights(shares(AverageConfig(rule=rule), given), floor)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 49, 128])
def test_weights_are_multiples_of_a_unit_that_add_up_to_exactly_one_in_any_order(rule, size):
    found = chosen(rule, random_scores(size, size))
    assert sum(map(Fraction, found)) == 1
    assert all((UNITS * Fraction(one)).denominator == 1 for one in found)
    assert [float(np.float32(one)) for one in found] == found
    total = np.float32(0)
    for one in found[::-1]:
        total += np.float32(one)
    assert total == 1
    assert min(found) >= 0.1 / size - 1 / UNITS


@pytest.mark.parametrize("rule", RULES)
def test_weights_follow_the_replicas_when_they_change_places(rule):
    given = random_scores(4, 3)
    before = chosen(rule, given)
    for order in itertools.permutations(range(4)):
        after = chosen(rule, Scores(*(one[list(order)] for one in given)))
        expected = [before[index] for index in order]
        # Of equal replicas the first ones get what is left over, one unit each.
        assert after == pytest.approx(expected, rel=0, abs=1 / UNITS if rule == "best" else 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 12])
def test_equal_scores_give_the_weights_of_the_equal_rule(rule, size):
    given = scores([0.7310] * size, [0.6173] * size, [913.0] * size)
    assert chosen(rule, given) == chosen("equal", given)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("size", [0.1, 0.3, 0.6]),
        ("accuracy", [0.5, 0.3, 0.2]),
        ("inverse-loss", [4 / 7, 2 / 7, 1 / 7]),
        ("softmax", list(np.exp([-2.0, -4.0, -8.0]) / np.exp([-2.0, -4.0, -8.0]).sum())),
        ("best", [1.0, 0.0, 0.0]),
    ],
)
def test_shares_are_those_of_the_formula(rule, expected):
    given = scores([0.5, 1.0, 2.0], [0.75, 0.45, 0.30], [100.0, 300.0, 600.0])
    np.testing.assert_allclose(shares(AverageConfig(rule=rule), given), expected, rtol=1e-12)


def test_softmax_goes_from_the_best_to_equal_as_its_temperature_rises():
    given = scores([0.5, 0.6, 0.7])
    cold, hot = (shares(AverageConfig(rule="softmax", temperature=t), given) for t in (1e-3, 1e6))
    np.testing.assert_allclose(cold, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(hot, 1 / 3, atol=1e-6)


def test_losses_beyond_all_bounds_and_no_correct_answers_still_give_weights():
    assert chosen("softmax", scores([1e4, 2e4]), floor=0.0) == [1.0, 0.0]
    assert chosen("inverse-loss", scores([0.0, 0.0])) == [0.5, 0.5]
    assert chosen("accuracy", scores([1.0, 1.0], [0.0, 0.0])) == [0.5, 0.5]
    assert chosen("best", scores([0.5, 0.5, 1.0]), floor=0.0) == [0.5, 0.5, 0.0]


def test_the_floor_is_a_part_of_the_equal_weight():
    assert weights(np.array([1.0, 0.0, 0.0, 0.0]), 0.5) == [0.625, 0.125, 0.125, 0.125]
    assert weights(np.array([1.0, 0.0]), 1.0) == [0.5, 0.5]


def test_smoothing_is_a_moving_average_that_begins_with_the_first_round():
    first, second = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    np.testing.assert_array_equal(smoothed(first, None, 0.75), first)
    np.testing.assert_array_equal(smoothed(second, first, 0.75), [0.75, 0.25])
    np.testing.assert_array_equal(smoothed(first, np.array([0.2, 0.3, 0.5]), 0.75), first)  # of other groups
