"""Linear subspaces of features: projections, rejections, principal angles, and the gradients of their separation.

Everything is float64 on the host, by LAPACK. Nothing differentiates a single eigenvector: gradients pass through
projectors, which stay smooth where eigenvalues on one side of the cut meet.
Legend: N samples, D features, M classes, d dimensions of a subspace.

References
----------
Björck, Golub, "Numerical methods for computing angles between linear subspaces", Math. Comp. 27 (1973).
Edelman, Arias, Smith, "The geometry of algorithms with orthogonality constraints", SIAM J. Matrix Anal. 20 (1998).
Sekmen et al., "Robust feature space separation for deep convolutional neural network training", Discov. Artif.
Intell. 1 (2021), for what is separated from what; the formulas of the losses are not published and are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

SHORTEST = 1e-12
"""Features of a smaller norm have no direction."""

SAME_GAP = 1e-6
"""Eigenvalues closer than this, relative to the largest, count as one: what would turn between them is held back."""

NO_VARIANCE = 1e-10
"""Eigenvalues below this, relative to the largest, belong to no direction that was seen."""

SMALLEST_COSINE = 1e-9
"""Keeps the gradient of an angle finite where the angle is a right one, and the gradient nought."""


class Spectrum(NamedTuple):
    """A symmetric matrix by its eigenvalues, cut into a subspace and the rest."""

    values: np.ndarray
    """(D,), the largest first."""
    vectors: np.ndarray
    """(D, D), in columns."""
    dimension: int
    """Of the subspace: so many leading vectors span it. 0 for a matrix of zeros."""

    @property
    def basis(self) -> np.ndarray:
        """The subspace's orthonormal basis, (D, d)."""
        return self.vectors[:, : self.dimension]


class Separation(NamedTuple):
    """How little the subspaces of classes are apart, 0 (at right angles) to 1, and the gradients of the matrices."""

    value: float
    gradients: np.ndarray
    """(M, D, D), symmetric."""


def unit(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return features of norm 1 and the norms before, of shapes (N, D) and (N, 1)."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, SHORTEST), norms


def unit_backward(grad: np.ndarray, directions: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Return the gradient of the features, (N, D), from that of their directions; nought where they have none."""
    across = grad - directions * np.sum(grad * directions, axis=1, keepdims=True)
    return np.where(norms > SHORTEST, across / np.maximum(norms, SHORTEST), 0.0)


def spectrum(matrix: np.ndarray, dimension: int, energy: float = 0.0) -> Spectrum:
    """Return the subspace of the leading eigenvectors of a symmetric positive semidefinite matrix (D, D).

    Parameters
    ----------
    dimension : int
        Most dimensions; fewer where the matrix has fewer directions.
    energy : float
        The fewest dimensions that hold this share of the trace are taken; 0: as many as `dimension` says.
    """
    values, vectors = np.linalg.eigh(matrix)
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = int(np.count_nonzero(values[:dimension] > NO_VARIANCE * max(values[0], 0.0)))
    if energy and kept:
        share = np.cumsum(np.maximum(values, 0.0)) / np.maximum(values, 0.0).sum()
        kept = min(kept, int(np.searchsorted(share, energy)) + 1)
    return Spectrum(values, vectors, kept)


def projector_backward(cut: Spectrum, grad: np.ndarray) -> np.ndarray:
    """Return the gradient of a matrix from `grad`, the symmetric gradient of the projector on its subspace (D, D)."""
    d, vectors = cut.dimension, cut.vectors
    gap = cut.values[:d, None] - cut.values[None, d:]
    turn = 2.0 * (vectors[:, :d].T @ grad @ vectors[:, d:]) * gap / (gap**2 + (SAME_GAP * cut.values[0]) ** 2)
    half = vectors[:, :d] @ turn @ vectors[:, d:].T
    return 0.5 * (half + half.T)


def rejections(directions: np.ndarray, bases: Sequence[np.ndarray]) -> np.ndarray:
    """Return the lengths, (N, M), of what is left of unit vectors (N, D) without their parts in each subspace (D, d).

    0: the vector lies in the subspace; 1: it is at right angles to it.
    """
    return np.stack([np.linalg.norm(directions - (directions @ u) @ u.T, axis=1) for u in bases], axis=1)


def principal_angles(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the angles between two subspaces in radians, the smallest first, from orthonormal bases in columns."""
    cosines = np.linalg.svd(one.T @ other, compute_uv=False)
    smaller, larger = (one, other) if one.shape[1] <= other.shape[1] else (other, one)
    sines = np.linalg.svd(smaller - larger @ (larger.T @ smaller), compute_uv=False)[::-1]
    return np.arctan2(np.minimum(sines, 1.0), np.minimum(cosines, 1.0))  # each where it is exact


def angle_matrix(bases: Sequence[np.ndarray]) -> np.ndarray:
    """Return the smallest principal angle between each two subspaces in degrees, (M, M); 0 where one is empty."""
    angles = np.zeros((len(bases), len(bases)))
    for i, one in enumerate(bases):
        for j, other in enumerate(bases[:i]):
            if one.shape[1] and other.shape[1]:
                angles[i, j] = angles[j, i] = np.degrees(principal_angles(one, other)[0])
    return angles


def separation(cuts: Sequence[Spectrum], measure: Literal["geodesic", "chordal"]) -> Separation:
    """Return how little each subspace is apart from the sum of all others, in the mean, with the exact gradients.

    Of the angles theta_k between S_i and the sum of the S_j, j != i: geodesic, 1 - mean_k theta_k^2 / (pi/2)^2, the
    squared distance on the Grassmannian as a share of the largest; chordal, mean_k cos^2 theta_k. Both depend on S_i
    and on the S_j; empty subspaces are left out.
    """
    here = [index for index, cut in enumerate(cuts) if cut.dimension]
    size = cuts[0].vectors.shape[0]
    total, projectors, sums = 0.0, np.zeros((len(cuts), size, size)), np.zeros((len(cuts), size, size))
    for i in here if len(here) > 1 else []:
        own, d = cuts[i].basis, cuts[i].dimension
        span, lengths, _ = np.linalg.svd(np.hstack([cuts[j].basis for j in here if j != i]), full_matrices=False)
        rank = int(np.count_nonzero(lengths > SAME_GAP * lengths[0]))
        span, lengths = span[:, :rank], lengths[:rank]
        left, cosines, right = np.linalg.svd(own.T @ span, full_matrices=False)
        cosines = np.clip(cosines, 0.0, 1.0)
        lost, slope = _apart(cosines, d, measure)
        scale = 1.0 / len(here)
        total += scale * lost
        mine, theirs = own @ left, span @ right.T
        projectors[i] += scale * (theirs * slope) @ theirs.T
        # The sum of subspaces is the range of the sum of projectors: its other eigenvalues are zeros.
        turn = (mine * slope) @ mine.T
        held = lengths**2 / (lengths**4 + (SAME_GAP * lengths[0] ** 2) ** 2)
        half = (span * held) @ (span.T @ turn - (span.T @ turn @ span) @ span.T)
        sums[i] = scale * (half + half.T)
    everyone = sums.sum(axis=0)
    gradients = np.zeros_like(projectors)
    for i in here:
        gradients[i] = projector_backward(cuts[i], projectors[i] + everyone - sums[i])
    return Separation(total, gradients)


def _apart(cosines: np.ndarray, dimension: int, measure: str) -> tuple[float, np.ndarray]:
    """Return the loss of one subspace from the cosines of its angles, and its derivatives by the squared cosines.

    Angles that the sum of the others is too small to have are right ones, and lose nothing.
    """
    if measure == "chordal":
        return float(np.sum(cosines**2)) / dimension, np.full(cosines.shape, 1.0 / dimension)
    angles, sines = np.arccos(cosines), np.sqrt(1.0 - cosines**2)
    unlost = 1.0 / (dimension * (0.5 * np.pi) ** 2)
    ratio = np.divide(angles, sines, out=np.ones_like(angles), where=sines > 0)
    missing = dimension - len(cosines)
    lost = 1.0 - unlost * float(np.sum(angles**2)) - missing / dimension
    return lost, unlost * ratio / np.maximum(cosines, SMALLEST_COSINE)


def decide(rejected: np.ndarray, thresholds: np.ndarray, *, unknown: bool = False) -> np.ndarray:
    """Return the class of each sample, int64 (N,), from its rejections by M subspaces, (N, M), and their thresholds.

    Candidates are the classes whose rejection is at most the threshold. A single one is taken; of several, and of all
    where there is none, that of the smallest share of its threshold. `unknown`: without a candidate the answer is -1.
    """
    shares = rejected / np.maximum(thresholds, SHORTEST)  # a candidate has at most 1, so the smallest is one if any is
    best = np.argmin(shares, axis=1)
    return np.where(shares.min(axis=1) > 1.0, -1, best) if unknown else best


def fit_threshold(rejected: np.ndarray, own: np.ndarray) -> float:
    """Return the threshold of least balanced error of "rejected <= threshold means own".

    The middle between the neighbouring values; of equally good places the middle one.

    Parameters
    ----------
    rejected : ndarray, shape (N,)
    own : ndarray of bool, shape (N,)
        With at least one of either kind.
    """
    order = np.argsort(rejected, kind="stable")
    values, mine = rejected[order], own[order]
    missed = 1.0 - np.cumsum(mine) / mine.sum()
    wrong = np.cumsum(~mine) / (~mine).sum()
    errors = missed + wrong
    errors[:-1][values[:-1] == values[1:]] = np.inf  # no threshold lies between equals
    best = np.flatnonzero(errors <= errors.min() + 1e-12)
    place = int(best[len(best) // 2])
    return float(values[place] if place + 1 == len(values) else 0.5 * (values[place] + values[place + 1]))
