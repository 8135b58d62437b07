"""Terms that a loss adds to the cross entropy, on features: what pulls the subspaces of classes apart.

Two methods. One network whose class subspaces are moved apart (`SubspaceSeparation`); and of M networks, one a class,
the one whose own class shall lie in a subspace that rejects all others (`RejectionMargin`). Both follow second moments
of unit features over the steps, and differentiate through the batch's part of them only.
Legend: N samples, D features, M classes, d dimensions of a subspace.

References
----------
Sekmen, Parlaktuna, Abdul-Malek, Erdemir, Koku, "Robust feature space separation for deep convolutional neural network
training", Discover Artificial Intelligence 1:12 (2021). Its formulas are not published in what could be read: these
are a reconstruction, described in docs/papers.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Literal, Protocol

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.config import SeparationConfig
from hpcnn.errors import ConfigError
from hpcnn.nn import subspace
from hpcnn.nn.context import StepContext
from hpcnn.spec import ModelSpec

OWN_STATE = "separation/"
MATRICES, BASIS, THRESHOLD = f"{OWN_STATE}matrices", f"{OWN_STATE}basis", f"{OWN_STATE}threshold"
"""Names of what is saved: packed second moments, and of a network of one class its subspace and its threshold."""

LARGEST_STATE_BYTES = 4 << 30
"""Of the class matrices, of which every rank has all."""

ReduceSum = Callable[[np.ndarray], None]


class FeatureLoss(Protocol):
    """A term of the loss that depends on the output of one layer.

    Attributes
    ----------
    layer : str
        Whose output, flattened, are the features.
    statistics : dict of str to ndarray
        What is saved beside the parameters, updated in place.
    value : float
        This block's share of the term in the last step, its weight included.
    """

    layer: str
    statistics: dict[str, np.ndarray]
    value: float

    def forward(self, features: Array, labels: np.ndarray, context: StepContext) -> tuple[float, Array | None]:
        """Return this block's share of the term and the gradient of its features, or None for none (collective).

        Parameters
        ----------
        features : Array, shape (n, ...)
            Of this block's samples; a block may have none.
        labels : ndarray of int, shape (n,)
        """


def feature_layer(spec: ModelSpec, name: str) -> tuple[str, int]:
    """Return the layer whose outputs are the features, and their number; "" stands for what the last layer reads.

    Raises
    ------
    ConfigError
        If there is no such layer, or it is the last one.
    """
    last = spec.layers[-1]
    shapes = {layer.name: layer.output_shape for layer in spec.layers[:-1]}
    name = name or last.inputs[0]
    if name not in shapes:
        raise ConfigError(
            f"config: 'separation.layer' (={name!r}) must be a layer of '{spec.name}' before the last:"
            f" {', '.join(shapes)}. Leave it out for what the last layer reads."
        )
    return name, prod(shapes[name])


class ClassMatrices:
    """Running second moments of the unit features of each class: (1 - eta) C + eta C(batch), linear, not centred.

    A class that a batch lacks keeps its matrix; its first batch is taken as it is.

    Parameters
    ----------
    num_classes, size : int
        M and D.
    eta : float
        Share of a batch, above 0 and at most 1.
    reduce_sum : callable
        Sums a float64 array in place over everyone who holds part of the batch (collective).

    Attributes
    ----------
    packed : ndarray of float64, shape (M, D (D + 1) / 2)
        The upper triangles, row by row.
    """

    def __init__(self, num_classes: int, size: int, eta: float, reduce_sum: ReduceSum) -> None:
        self.packed = np.zeros((num_classes, size * (size + 1) // 2))
        self._eta, self._reduce_sum = eta, reduce_sum
        self._upper = np.triu_indices(size)

    def update(self, directions: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Take in a batch of which this block has the directions (n, D); one small all-reduce (collective).

        Labels that are no class are left out.

        Returns
        -------
        ndarray, shape (M,)
            Derivative of each class's matrix by the sum of f f^T over the batch's samples of that class.
        """
        num_classes, length = self.packed.shape
        sums = np.zeros((num_classes, length + 1))
        for index in range(num_classes):
            own = directions[labels == index]
            if len(own):
                sums[index, :-1] = (own.T @ own)[self._upper]
                sums[index, -1] = len(own)
        self._reduce_sum(sums)
        counts = sums[:, -1]
        share = np.where(self.packed.any(axis=1), self._eta, 1.0) * (counts > 0)
        slopes: np.ndarray = share / np.maximum(counts, 1.0)
        self.packed *= (1.0 - share)[:, None]
        self.packed += slopes[:, None] * sums[:, :-1]
        return slopes

    @property
    def are_finite(self) -> bool:
        """Whether they can be decomposed; where not, the loss is no number, which ends the training on all ranks."""
        return bool(np.isfinite(self.packed).all())

    def spectra(self, dimension: int, energy: float) -> list[subspace.Spectrum]:
        """Return the classes' subspaces."""
        return spectra(self.packed, dimension, energy)


def spectra(packed: np.ndarray, dimension: int, energy: float) -> list[subspace.Spectrum]:
    """Return the subspaces of second moments as `ClassMatrices.packed` holds them."""
    size = int(np.sqrt(2 * packed.shape[1]))
    found = []
    for row in packed:
        matrix = np.zeros((size, size))
        matrix[np.triu_indices(size)] = row
        found.append(subspace.spectrum(matrix + np.triu(matrix, 1).T, dimension, energy))
    return found


class SubspaceSeparation:
    """The separation of each class's subspace from the sum of all others, by a distance on the Grassmannian.

    All ranks hold the same class matrices and decompose them by the same library in float64. Where they come to other
    last bits, parameters stay equal all the same: each rank's part of the gradient is summed before it is used.

    Parameters
    ----------
    spec : ModelSpec
        Ends in one logit for each of M classes.
    config : SeparationConfig
        Of method "geodesic" or "chordal".
    reduce_sum : callable
        Sums a float64 array in place over the ranks (collective).

    Raises
    ------
    ConfigError
        If D is at most M d: the sum of the other subspaces would leave no room, and the loss and its gradient be dead.
    """

    def __init__(self, spec: ModelSpec, config: SeparationConfig, reduce_sum: ReduceSum) -> None:
        self.layer, size = feature_layer(spec, config.layer)
        classes, d = spec.num_classes, config.dimension
        if size <= classes * d:
            widest = (size - 1) // classes
            fix = f"Set separation.dimension to at most {widest}, or name" if widest else "Name"
            raise ConfigError(
                f"config: 'separation.dimension' (={d}) is too large: the {size} features of layer '{self.layer}' must"
                f" be more than {classes} classes times {d} dimensions (={classes * d}), or the subspaces of the others"
                f" fill the space, and neither loss nor gradient is left. {fix} a wider layer by separation.layer."
            )
        _refuse_large(classes, size, self.layer)
        self._measure: Literal["geodesic", "chordal"] = "chordal" if config.method == "chordal" else "geodesic"
        self._config = config
        self._matrices = ClassMatrices(classes, size, config.eta, reduce_sum)
        self.statistics = {MATRICES: self._matrices.packed}
        self.value = 0.0

    def forward(self, features: Array, labels: np.ndarray, context: StepContext) -> tuple[float, Array | None]:
        """See `FeatureLoss.forward`; between refreshes there is no term, and nothing is sent."""
        config = self._config
        self.value = 0.0
        if context.step % config.refresh:
            return 0.0, None
        directions, norms = directions_of(features)
        slopes = self._matrices.update(directions, labels)
        if not config.weight:
            return 0.0, None
        if not self._matrices.are_finite:
            self.value = math.nan
            return math.nan, None
        found = subspace.separation(self._matrices.spectra(config.dimension, config.energy), self._measure)
        self.value = config.weight * found.value * len(labels) / context.global_batch
        grad = np.zeros_like(directions)
        for index, (slope, gradient) in enumerate(zip(slopes, found.gradients, strict=True)):
            own = labels == index
            grad[own] = (2.0 * config.weight * slope) * (directions[own] @ gradient)
        return self.value, _like(subspace.unit_backward(grad, directions, norms), features)


class RejectionMargin:
    """Of a network for one class: small rejections of its own samples, large ones of all others.

    The mean over the batch of r^2 for own samples and max(0, margin - r)^2 for others, r = ||(I - P) f|| / ||f||; P
    projects on the subspace of the own samples, as of the last refresh, and counts as constant.

    Parameters
    ----------
    spec : ModelSpec
        Ends in two logits: another class (label 0), the own one (label 1).
    config : SeparationConfig
        Of method "rejection".
    reduce_sum : callable
        Sums a float64 array in place over the ranks (collective).

    Raises
    ------
    ConfigError
        If the subspace would be all of the feature space, or the network has not two logits.
    """

    def __init__(self, spec: ModelSpec, config: SeparationConfig, reduce_sum: ReduceSum) -> None:
        if spec.num_classes != 2:
            raise ConfigError(
                f"config: 'separation.method' (='rejection') trains networks of two answers, this one has"
                f" {spec.num_classes}. `hpcnn train` and `hpcnn evaluate` of a run folder make them; for other commands"
                ' set separation.method = "none".'
            )
        self.layer, size = feature_layer(spec, config.layer)
        if size <= config.dimension:
            raise ConfigError(
                f"config: 'separation.dimension' (={config.dimension}) must be below the {size} features of layer"
                f" '{self.layer}', or nothing is ever rejected. Lower it, or name a wider layer by separation.layer."
            )
        _refuse_large(1, size, self.layer)
        self._config = config
        self._matrices = ClassMatrices(1, size, config.eta, reduce_sum)
        self._basis = np.zeros((size, config.dimension))
        self.statistics = {MATRICES: self._matrices.packed, BASIS: self._basis, THRESHOLD: np.zeros(1)}
        self.value = 0.0

    def forward(self, features: Array, labels: np.ndarray, context: StepContext) -> tuple[float, Array | None]:
        """See `FeatureLoss.forward`."""
        config = self._config
        directions, norms = directions_of(features)
        self._matrices.update(directions, labels - 1)
        if not self._matrices.are_finite:
            self.value = math.nan
            return math.nan, None
        if context.step % config.refresh == 0 or not self._basis.any():
            (cut,) = self._matrices.spectra(config.dimension, config.energy)
            self._basis[...] = 0.0
            self._basis[:, : cut.dimension] = cut.basis
        rest = directions - (directions @ self._basis) @ self._basis.T
        rejected = np.linalg.norm(rest, axis=1)
        short = np.maximum(config.margin - rejected, 0.0)
        own = labels == 1
        scale = config.weight / context.global_batch
        self.value = scale * float(np.sum(np.where(own, rejected**2, short**2)))
        pull = np.where(own, 1.0, -short / np.maximum(rejected, subspace.SHORTEST))
        grad = (2.0 * scale * pull)[:, None] * rest
        return self.value, _like(subspace.unit_backward(grad, directions, norms), features)


def directions_of(features: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return features of shape (N, ...) as unit vectors (N, D) in float64 on the host, and their norms (N, 1)."""
    host = arrays.to_host(features)
    return subspace.unit(host.reshape(len(host), prod(host.shape[1:])).astype(np.float64))


def _like(grad: np.ndarray, features: Array) -> Array:
    return arrays.to_device(grad.reshape(features.shape).astype(features.dtype), features)


def _refuse_large(classes: int, size: int, layer: str) -> None:
    num_bytes = 8 * classes * size * (size + 1) // 2
    if num_bytes > LARGEST_STATE_BYTES:
        raise ConfigError(
            f"config: the second moments of {classes} classes in the {size} features of layer '{layer}' take"
            f" {num_bytes / 1e9:.0f} GB on every rank, the limit is {LARGEST_STATE_BYTES / 1e9:.0f} GB. Name a narrower"
            " layer by separation.layer."
        )
