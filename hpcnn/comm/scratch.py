"""Scratch memory of collectives, handed on from one to the next."""

from __future__ import annotations

import numpy as np

from hpcnn import arrays


class Scratch:
    """Memory that is not in use at the moment."""

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []

    def take(self, num_bytes: int, held: np.ndarray | None = None) -> np.ndarray:
        """Return at least `num_bytes` bytes: `held`, or old memory, where that is large enough."""
        if held is not None and held.nbytes >= num_bytes:
            return held
        scratch = self.free.pop() if self.free else held
        if scratch is None or scratch.nbytes < num_bytes:
            scratch = arrays.empty(1 << max(12, (num_bytes - 1).bit_length()), np.uint8)
        return scratch

    def give(self, scratch: np.ndarray) -> None:
        """Take back memory lent by `take`."""
        self.free.append(scratch)
