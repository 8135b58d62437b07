"""Intervals of few repeats, against densities integrated numerically and against resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpcnn.analysis.confidence import Estimate, mean, ratio, t_quantile


def probability_within(limit: float, freedom: int) -> float:
    """Return the integral of Student's density from -limit to limit."""
    x = np.linspace(-limit, limit, 200_001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    return float(np.trapezoid(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2), x))


@pytest.mark.parametrize("freedom", [*range(1, 35), 60, 500])
def test_nineteen_in_twenty_lie_within_the_quantile(freedom: int) -> None:
    tolerance = 2e-5 if freedom <= 30 else 4e-4  # a table, and an expansion
    assert pytest.approx(0.95, abs=tolerance) == probability_within(t_quantile(freedom), freedom)


def test_a_fraction_of_a_degree_of_freedom_does_not_narrow_an_interval() -> None:
    assert t_quantile(2) == t_quantile(2.9) > t_quantile(3)
    assert t_quantile(1) == t_quantile(0.4)


def test_the_mean_of_three_has_the_interval_of_the_textbook() -> None:
    value, half_width = mean([1.0, 2.0, 6.0])
    assert value == 3.0
    # Standard deviation sqrt(14 / 2), two degrees of freedom.
    assert pytest.approx(4.302653 * math.sqrt(7.0) / math.sqrt(3.0), rel=1e-4) == half_width
    assert Estimate(5.0, None) == mean([5.0])
    assert mean([5.0, 5.0]).half_width == 0.0


def test_intervals_of_means_and_ratios_hold_the_truth_nineteen_times_in_twenty() -> None:
    draw = np.random.default_rng(7)
    trials, held = 3000, np.zeros(2)
    for _ in range(trials):
        above, below = draw.normal(3.0, 0.10, 4), draw.normal(2.0, 0.15, 3)
        for place, (truth, found) in enumerate(((3.0, mean(above)), (1.5, ratio(above, below)))):
            held[place] += abs(found.value - truth) <= found.half_width
    # Binomial noise is 0.4 %; Welch's degrees of freedom are rounded down, so the ratio's may hold more often.
    assert 0.935 < held[0] / trials < 0.965
    assert 0.935 < held[1] / trials < 0.985


def test_a_ratio_is_of_means_and_known_to_nobody_from_one_repeat() -> None:
    assert Estimate(2.0, None) == ratio([4.0], [1.0, 3.0])
    assert Estimate(0.5, None) == ratio([1.0, 3.0], [4.0])
    assert Estimate(2.0, 0.0) == ratio([4.0, 4.0], [2.0, 2.0, 2.0])
