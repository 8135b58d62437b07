"""Kernel matrices of whole layers, each rank working on its channels.

A layer of C feature maps is C variables, with the exponent E = sum_c d_c^2 / (2 sigma_c^2), or one variable, with
E = sum_c d_c^2 / (2 sigma^2), d_c the distances of map c. Either follows from inner products of samples, which add up
over channels: each rank sums its own, divided by sigma_c^2, and one reduce-scatter of N x N matrices leaves every rank
with the whole sums of some layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcnn.analysis.entropy import centred_products
from hpcnn.analysis.widths import WidthRule, inverse_square
from hpcnn.comm.collectives import reduce_scatter
from hpcnn.comm.world import World
from hpcnn.geometry import Block, blocks

CHUNK = 4096
"""Features whose products are computed at once, in float64."""


def products_of_rows(x: np.ndarray) -> np.ndarray:
    """Return the inner products of centred samples, in float64 whatever the type of `x`, shape (N, ...)."""
    rows = x.reshape(len(x), -1)
    total = np.zeros((len(x), len(x)))
    for start in range(0, rows.shape[1], CHUNK):
        total += centred_products(rows[:, start : start + CHUNK].astype(np.float64))
    return total


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
            Gains inner products, over sigma^2 where a map has a kernel of its own.
        groups : ndarray of bool, shape (groups, c), optional
            Which of the channels belong to each.
        grouped : ndarray, shape (groups, N, N)
            Gains the same.

        Returns
        -------
        float
            This rank's share of the mean width of the maps; 0 where the layer is one variable.
        """
        if x.ndim == 2:
            total += products_of_rows(x)
            return 0.0
        if groups is None and (not self.maps or self.rule.needs_variance_only):
            return self._add_at_once(x, total)
        widths = 0.0
        rows = x.reshape(len(x), -1, x.shape[-1])
        for channel, map_rows in enumerate(np.ascontiguousarray(rows.transpose(2, 0, 1))):
            own = centred_products(map_rows)
            if self.maps:
                width = self._widen * self.rule.scale * self.rule.width(own, self.features)
                widths += width / self.channels
                own *= inverse_square(width)
            total += own
            if groups is not None and grouped is not None:
                for index in np.flatnonzero(groups[:, channel]):
                    grouped[index] += own
        return widths

    def _add_at_once(self, x: np.ndarray, total: np.ndarray) -> float:
        """Do what `add` does with one product of matrices: features over their map's sigma add up to the same."""
        rows, widths = x.reshape(len(x), -1), 0.0
        centred = rows - rows.mean(axis=0)
        if self.maps:
            squares = np.einsum("nf,nf->f", centred, centred).reshape(-1, x.shape[-1]).sum(axis=0, dtype=np.float64)
            factor = self._widen * self.rule.scale
            own = [factor * self.rule.width_of(one / (len(x) - 1), len(x), self.features) for one in squares]
            widths = sum(own) / self.channels
            inverses = np.sqrt([inverse_square(width) for width in own])
            centred *= np.tile(inverses.astype(centred.dtype), self.features)
        total += centred @ centred.T
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
