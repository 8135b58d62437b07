"""How wide a kernel is: sigma of exp(-d^2 / (2 sigma^2)), from the distances between the samples.

Publications disagree about the factor 2 and about squares; here sigma is a distance, in the units of the data, and
every rule but "fixed" gives it in proportion to the data, so that errors of size 1e-5 need no other constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpcnn.analysis.entropy import kernel, mean_off_diagonal, squared_distances

GRID = 60
"""Widths that "alignment" tries, from a twentieth to ten times the mean distance, in equal ratios."""
SMOOTHING = 0.9
"""Weight of the last width under "alignment"."""


@dataclass(frozen=True)
class WidthRule:
    """A way to choose widths.

    Parameters
    ----------
    name : {"silverman", "quantile", "alignment", "fixed"}
        silverman: N^(-1 / (4 + features)) times the spread, the square root of the sum of the features' variances.
        quantile: that of the distances between different samples. alignment: the one whose kernel is most like that of
        the labels (Wickstroem et al., arXiv:1909.11396), smoothed over time. fixed: 1.
    scale : float
        Factor on top of it.
    quantile : float
        For the rule of that name.
    """

    name: str
    scale: float = 1.0
    quantile: float = 0.05

    @property
    def needs_variance_only(self) -> bool:
        """Whether `width_of` knows the width, which takes no products of samples."""
        return self.name in ("silverman", "fixed")

    def width_of(self, variance: float, samples: int, features: int) -> float:
        """Return sigma from the sum of the features' variances, as `width` does; 0 where that is none or no number."""
        if self.name == "fixed":
            return 1.0
        if not np.isfinite(variance) or variance <= 0.0:
            return 0.0
        return float(np.sqrt(variance) * samples ** (-1.0 / (4.0 + features)))

    def width(
        self, products: np.ndarray, features: int, same_class: np.ndarray | None = None, last: float = 0.0
    ) -> float:
        """Return sigma, without the factor `scale`; 0 where all samples are alike.

        Parameters
        ----------
        products : ndarray, shape (N, N)
            Inner products of the centred samples.
        features : int
            Numbers in a sample.
        same_class : ndarray, shape (N, N), optional
            1 where labels are equal and 0 elsewhere; for "alignment".
        last : float
            The width before this one; 0: there is none.
        """
        n, variance = len(products), np.trace(products) / (len(products) - 1)
        if self.needs_variance_only or not np.isfinite(variance) or variance <= 0.0:
            return self.width_of(variance, n, features)
        distances = squared_distances(products)
        if self.name == "quantile":  # maps that are zero for many samples have many distances of zero
            return float(np.sqrt(np.quantile(distances[distances > 0.0], self.quantile)))
        assert same_class is not None, "the labels are what to align with"
        best = _aligned(distances, same_class)
        return SMOOTHING * last + (1.0 - SMOOTHING) * best if last > 0.0 else best


def inverse_square(width: float) -> float:
    """Return 1 / sigma^2, or 0, which makes a variable that says nothing, for a width of 0."""
    return 1.0 / (width * width) if width else 0.0


def exponent(products: np.ndarray, width: float = 1.0) -> np.ndarray:
    """Return squared distances over 2 sigma^2, from inner products."""
    return squared_distances(products) * (0.5 * inverse_square(width))


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Return the cosine of the angle between two kernel matrices."""
    return float(np.vdot(first, second) / np.sqrt(np.vdot(first, first) * np.vdot(second, second)))


def _aligned(distances: np.ndarray, same_class: np.ndarray) -> float:
    widths = mean_off_diagonal(np.sqrt(distances)) * np.geomspace(0.05, 10.0, GRID)
    return float(max(widths, key=lambda width: alignment(kernel(distances / (2.0 * width * width)), same_class)))
