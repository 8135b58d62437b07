"""Matrix-based Rényi entropies of samples, in bits: what information a layer's outputs share with inputs and labels.

N samples of a variable have a kernel matrix K, K_ij = exp(-d_ij^2 / (2 sigma^2)), with d_ij their Euclidean distance.
The eigenvalues of A = K / N add up to one, and the entropy is that of these numbers as if they were probabilities:

    S_alpha(A) = log2(sum_i lambda_i^alpha) / (1 - alpha),      S_1(A) = -sum_i lambda_i log2 lambda_i

It lies between 0 (all samples alike) and log2 N (all far apart). Several variables together have the elementwise
product of their kernels. That is exp(-(E_1 + E_2 + ...)) with the exponents E = d^2 / (2 sigma^2): the joint entropy of
any number of variables takes one sum of matrices and the eigenvalues of one.

References
----------
Sanchez Giraldo, Rao, Principe, "Measures of entropy from data using infinitely divisible kernels", IEEE Trans. Inf.
Theory 61 (2015). Yu, Sanchez Giraldo, Jenssen, Principe, "Multivariate extension of matrix-based Renyi's alpha-order
entropy functional", IEEE Trans. PAMI 42 (2020). Yu, Wickstroem, Jenssen, Principe, "Understanding convolutional neural
networks with information theory", IEEE Trans. Neural Netw. Learn. Syst. 32 (2021).
"""

from __future__ import annotations

import numpy as np


def centred_products(x: np.ndarray) -> np.ndarray:
    """Return the inner products of rows, less their mean, computed in the type of `x`.

    Products of several groups of features, each over its sigma^2, add up: `squared_distances` of such a sum is twice
    the sum of exponents.

    Parameters
    ----------
    x : ndarray, shape (N, features)

    Returns
    -------
    ndarray of float64, shape (N, N)
        Its trace over N - 1 is the sum of the features' variances.
    """
    centred = x - x.mean(axis=0)  # smaller numbers, and so less cancellation
    return (centred @ centred.T).astype(np.float64)


def squared_distances(products: np.ndarray) -> np.ndarray:
    """Return the squared Euclidean distances between rows from their inner products.

    Parameters
    ----------
    products : ndarray, shape (N, N)

    Returns
    -------
    ndarray of float64, shape (N, N)
        Symmetric, not negative, with zeros on the diagonal.
    """
    norms = products.diagonal()
    distances = norms[:, None] + norms
    distances -= 2.0 * products
    np.maximum(distances, 0.0, out=distances)
    np.fill_diagonal(distances, 0.0)
    return distances


def kernel(exponent: np.ndarray) -> np.ndarray:
    """Return exp(-exponent): the kernel matrix of a variable, or of several whose exponents were added."""
    return np.exp(-exponent)


def mean_off_diagonal(matrix: np.ndarray) -> float:
    """Return the mean of what is not on the diagonal of a square matrix; zero where there is nothing else."""
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / max(1, n * (n - 1)))


def entropy(matrix: np.ndarray, alpha: float) -> float:
    """Return the entropy of a kernel matrix, in bits.

    Parameters
    ----------
    matrix : ndarray, shape (N, N)
        Symmetric and positive semi-definite, with ones on the diagonal.
    alpha : float
        Order, above zero. 1: von Neumann's entropy. 2: from the sum of squares, without eigenvalues.

    Returns
    -------
    float
        Not a number where the matrix has elements that are none.
    """
    n = len(matrix)
    total = float(np.vdot(matrix, matrix))
    if not np.isfinite(total):
        return float("nan")
    if alpha == 2.0:
        return float(2.0 * np.log2(n) - np.log2(total))
    return _of_probabilities(np.linalg.eigvalsh(matrix) / n, alpha)


def entropy_with_labels(matrix: np.ndarray, labels: np.ndarray, alpha: float) -> float:
    """Return the joint entropy of a variable and class labels, whose kernel is 1 within a class and 0 between classes.

    The product of the two kernels has one block a class, and its eigenvalues are those of the blocks: with ten equal
    classes a hundredth of the work.

    Parameters
    ----------
    matrix : ndarray, shape (N, N)
        Kernel matrix of the variable.
    labels : ndarray of int, shape (N,)
    alpha : float
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    blocks = [matrix[np.ix_(own, own)] for own in members]
    total = sum(float(np.vdot(block, block)) for block in blocks)
    if not np.isfinite(total):
        return float("nan")
    n = len(matrix)
    if alpha == 2.0:
        return float(2.0 * np.log2(n) - np.log2(total))
    return _of_probabilities(np.concatenate([np.linalg.eigvalsh(block) for block in blocks]) / n, alpha)


def label_entropy(labels: np.ndarray, alpha: float) -> float:
    """Return the entropy of class labels: that of their frequencies."""
    return _of_probabilities(np.unique(labels, return_counts=True)[1] / len(labels), alpha)


def total_correlation(single: np.ndarray, joint: float) -> tuple[float, float]:
    """Return how much less several variables have together than one by one, and that in parts of the most it can be.

    Parameters
    ----------
    single : ndarray, shape (variables,)
        Entropies.
    joint : float
        Their joint entropy.
    """
    total, most = float(np.sum(single) - joint), float(np.sum(single) - np.max(single))
    return total, total / most if most > 0.0 else 0.0


def dual_total_correlation(without: np.ndarray, joint: float) -> tuple[float, float]:
    """Return the joint entropy less what each variable has for itself alone, and that in parts of the joint entropy.

    Parameters
    ----------
    without : ndarray, shape (variables,)
        Joint entropies of all variables but one each.
    joint : float
        Joint entropy of all.
    """
    dual = float(np.sum(without) - (len(without) - 1) * joint)
    return dual, dual / joint if joint > 0.0 else 0.0


def _of_probabilities(probabilities: np.ndarray, alpha: float) -> float:
    """Return the entropy of numbers that add up to one; what rounding has made negative counts as zero."""
    p = probabilities[probabilities > 0.0]
    if alpha == 1.0:
        return float(-np.sum(p * np.log2(p)))
    return float(np.log2(np.sum(p**alpha)) / (1.0 - alpha))
