"""The one kind of movement: from boxes that ranks own to boxes that they need.

A message is what one rank owns of what another needs. All-gather, scatter, all-to-all and halo exchange differ in their
boxes only. The way back is the adjoint: the same messages turned round, and summed where they arrive; so the
all-gather's is the reduce-scatter, and the halo exchange's the halo sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from hpcnn.errors import PlanError
from hpcnn.plan.layout import Box, intersect, volume


class Parcel(NamedTuple):
    """One message: a box of the tensor, to or from rank `peer`."""

    peer: int
    box: Box


@dataclass(frozen=True)
class Movement:
    """A redistribution of one tensor.

    Parameters
    ----------
    source : sequence of Box
        What each rank owns; no element has two owners.
    target : sequence of Box
        What each rank needs; boxes may overlap, and every element of them has an owner.
    """

    source: tuple[Box, ...]
    target: tuple[Box, ...]

    def sends(self, rank: int) -> list[Parcel]:
        """Return what `rank` sends, nearest rank above first, so that not all begin with the same receiver."""
        return self._parcels(rank, self.source[rank], self.target)

    def receives(self, rank: int) -> list[Parcel]:
        """Return what `rank` receives.

        Raises
        ------
        PlanError
            If nobody owns a part of what it needs.
        """
        parcels = self._parcels(rank, self.target[rank], self.source)
        found = sum(volume(parcel.box) for parcel in parcels) + volume(self.kept(rank))
        if found != volume(self.target[rank]):
            raise PlanError(
                f"movement: rank {rank} needs {volume(self.target[rank])} elements of which others and it own {found};"
                " each must have one owner."
            )
        return parcels

    def kept(self, rank: int) -> Box:
        """Return what `rank` both owns and needs."""
        return intersect(self.source[rank], self.target[rank])

    def num_elements_sent(self, rank: int) -> int:
        """Return how many elements `rank` sends; on the way back it receives as many."""
        return sum(volume(parcel.box) for parcel in self.sends(rank))

    def gathered(self) -> list[int] | None:
        """Return where the ranks' pieces begin and end, one after the other, if this is a plain all-gather.

        It is one if all ranks need the same box and own pieces of it only.
        """
        whole = self.target[0]
        bounds = list(accumulate(map(volume, self.source), initial=0))
        if not volume(whole) or bounds[-1] != volume(whole) or any(box != whole for box in self.target):
            return None
        return bounds if all(intersect(box, whole) == box for box in self.source if volume(box)) else None

    @staticmethod
    def _parcels(rank: int, mine: Box, others: Sequence[Box]) -> list[Parcel]:
        if not volume(mine):
            return []
        size, (start, stop) = len(others), mine[0]
        peers = ((rank + i) % size for i in range(1, size))
        near = (peer for peer in peers if others[peer][0].start < stop and others[peer][0].stop > start)  # of thousands
        shared = ((peer, intersect(mine, others[peer])) for peer in near)
        return [Parcel(peer, box) for peer, box in shared if volume(box)]
