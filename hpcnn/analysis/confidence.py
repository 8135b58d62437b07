"""Means of few repeats, and how far they may be off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
_NORMAL975 = 1.959964


class Estimate(NamedTuple):
    """A mean, and the half width of its 95 % confidence interval; None where a single repeat cannot tell."""

    value: float
    half_width: float | None


def t_quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t distribution.

    Parameters
    ----------
    freedom : float
        Degrees of freedom, at least 1; a fraction is rounded down, which makes intervals wider.
    """
    whole = max(1, math.floor(freedom))
    if whole <= len(_T975):
        return _T975[whole - 1]
    # The first terms of the Cornish-Fisher expansion; Abramowitz and Stegun, 26.7.5.
    return _NORMAL975 + (_NORMAL975**3 + _NORMAL975) / (4.0 * whole)


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean of repeats with Student's interval."""
    centre, number = statistics.fmean(values), len(values)
    if number == 1:
        return Estimate(centre, None)
    return Estimate(centre, t_quantile(number - 1) * statistics.stdev(values) / math.sqrt(number))


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Return the quotient of the means of two independent series of positive repeats.

    Its variance is that of the first-order expansion of the quotient, with the degrees of freedom of Welch and
    Satterthwaite; a series of one repeat leaves it unknown.
    """
    quotient = statistics.fmean(above) / statistics.fmean(below)
    if min(len(above), len(below)) == 1:
        return Estimate(quotient, None)
    parts = [statistics.variance(some) / len(some) / statistics.fmean(some) ** 2 for some in (above, below)]
    relative = sum(parts)
    if relative == 0.0:
        return Estimate(quotient, 0.0)
    freedom = relative**2 / sum(part**2 / (len(some) - 1) for part, some in zip(parts, (above, below), strict=True))
    return Estimate(quotient, t_quantile(freedom) * quotient * math.sqrt(relative))
