"""What a test set says of the subspaces of features that a network was trained to keep apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpcnn.arrays import Array
from hpcnn.data import DataSet
from hpcnn.nn import subspace
from hpcnn.nn.separation import MATRICES, directions_of, spectra
from hpcnn.train.evaluate import collect
from hpcnn.train.setup import Parts


@dataclass(frozen=True)
class SeparationScore:
    """How well the subspaces of the training images' features tell test images apart, and how far apart they lie."""

    rejection_accuracy: float
    """Share of test images that their own class's subspace rejects least."""
    geodesic: float
    """Squared distance on the Grassmannian from the sum of the others, as a share of the largest; mean of classes."""
    chordal: float
    """Squared sine of the angles to the sum of the others; mean of classes."""
    angles: list[list[float]]
    """Smallest principal angle of each two classes' subspaces, in degrees."""

    @property
    def mean_angle(self) -> float:
        """Mean smallest angle of two different classes, in degrees."""
        angles, count = np.array(self.angles), len(self.angles)
        return float(angles.sum() / max(1, count * (count - 1)))


def measure_separation(parts: Parts, data: DataSet) -> SeparationScore:
    """Return the score by the class matrices that training has followed, equal on all ranks (collective)."""
    config = parts.config.separation
    cuts = spectra(parts.model.statistics[MATRICES], config.dimension, config.energy)
    bases = [cut.basis for cut in cuts]

    def nearest(logits: Array, features: Array) -> np.ndarray:
        return np.argmin(subspace.rejections(directions_of(features)[0], bases), axis=1)[:, None]

    found = collect(parts.program, data, parts.config.train.global_batch, 1, nearest)[:, 0]
    return SeparationScore(
        rejection_accuracy=float(np.mean(found == data.labels_of(np.arange(len(data))))),
        geodesic=1.0 - subspace.separation(cuts, "geodesic").value,
        chordal=1.0 - subspace.separation(cuts, "chordal").value,
        angles=subspace.angle_matrix(bases).tolist(),
    )
