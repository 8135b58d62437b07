"""Exponents of kernel matrices of whole layers, each rank working on its channels.

A layer of C feature maps is C variables, with the exponent E = sum_c d_c^2 / (2 sigma_c^2), or one variable, with
E = sum_c d_c^2 / (2 sigma^2), d_c^2 = the squared distances of map c. Either is a sum over channels, so each rank adds
up its own, and one reduce-scatter of N x N matrices leaves every rank with whole ones of some layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcnn.analysis.entropy import squared_distances
from hpcnn.analysis.widths import WidthRule, exponent
from hpcnn.comm.collectives import reduce_scatter
from hpcnn.comm.world import World
from hpcnn.geometry import Block, blocks

CHUNK = 4096
"""Features whose distances are computed at once, in float64."""


def distances_of_rows(x: np.ndarray) -> np.ndarray:
    """Return the squared distances between samples, in float64 whatever the type of `x`, shape (N, ...)."""
    rows = x.reshape(len(x), -1)
    total = np.zeros((len(x), len(x)))
    for start in range(0, rows.shape[1], CHUNK):
        total += squared_distances(rows[:, start : start + CHUNK].astype(np.float64))
    return total


def distances_of_map(x: np.ndarray, channel: int) -> np.ndarray:
    """Return the squared distances between samples in one feature map of `x`, shape (N, H, W, C), in its type."""
    return squared_distances(np.ascontiguousarray(x[..., channel]).reshape(len(x), -1))


class Layer:
    """What is known of a measured layer.

    Parameters
    ----------
    shape : tuple of int
        Of one sample's output, (H, W, C) or (F,).
    rule : WidthRule
        For its kernels.
    maps : bool
        Whether a feature map has a kernel of its own; only where there are maps.
    widen : bool
        Widen those by the square root of their number.
    """

    def __init__(self, shape: Sequence[int], rule: WidthRule, *, maps: bool, widen: bool) -> None:
        self.channels, self.rule = shape[-1], rule
        self.maps = maps and len(shape) == 3
        self.features = int(np.prod(shape[:-1] if self.maps else shape))
        self._widen = np.sqrt(self.channels) if widen and self.maps else 1.0

    def add(self, x: np.ndarray, total: np.ndarray, groups: np.ndarray | None, grouped: np.ndarray | None) -> float:
        """Add this rank's channels to `total`, and to the groups of maps that they belong to.

        Parameters
        ----------
        x : ndarray, shape (N, H, W, c) or (N, f)
            The channels.
        total : ndarray, shape (N, N)
            Gains exponents, or squared distances where the layer is one variable.
        groups : ndarray of bool, shape (groups, c), optional
            Which of the channels belong to each.
        grouped : ndarray, shape (groups, N, N)
            Gains exponents.

        Returns
        -------
        float
            This rank's share of the mean width of the maps; 0 where the layer is one variable.
        """
        if x.ndim == 2:
            total += distances_of_rows(x)
            return 0.0
        widths = 0.0
        for channel in range(x.shape[-1]):
            own = distances_of_map(x, channel)
            if self.maps:
                width = self._widen * self.rule.width(own, self.features)
                widths += width / self.channels
                own = exponent(own, width)
            total += own
            if groups is not None and grouped is not None:
                for index in np.flatnonzero(groups[:, channel]):
                    grouped[index] += own
        return widths


def shares(count: int, world: World) -> tuple[Block, ...]:
    """Return which of `count` matrices each rank has after `scatter`."""
    return blocks(count, world.size)


def scatter(stack: np.ndarray, world: World) -> np.ndarray:
    """Return this rank's share of the matrices, summed over all ranks (collective); `stack` is used up.

    Parameters
    ----------
    stack : ndarray, shape (matrices, N, N)
    """
    if world.size == 1:
        return stack
    return reduce_scatter(world.comm, stack, counts=[share.size for share in shares(len(stack), world)])
