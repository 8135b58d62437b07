"""Which part of a layer's work and state each rank owns.

Legend: N samples of the global batch, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcnn.errors import PlanError
from hpcnn.geometry import Block, split


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A process grid over the axes of an activation (N, H, W, C); weights are replicated along `sample`.

    `sample` counts the blocks of the batch. It is the one axis that can be cut in this version.
    """

    sample: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks in the grid."""
        return self.sample

    @property
    def name(self) -> str:
        """The word for this layout in plans and tables."""
        return "data"

    def samples(self, rank: int, global_batch: int) -> Block:
        """Return the positions in the global batch that `rank` owns; uneven batches give the first ranks one more."""
        if not 0 <= rank < self.ranks:
            raise PlanError(f"layout: rank (={rank}) must be below the number of ranks in the grid (={self.ranks}).")
        return split(global_batch, self.sample, rank)
