"""Movements of 16-bit activations: they travel, and gradients are added up, in float32.

MPI has no bfloat16, and a sum over ranks that is rounded once is nearer to that of one rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcnn import arrays, ops
from hpcnn.arrays import Array
from hpcnn.comm.movement import Mover


class Widened:
    """A `Mover` for tensors of `dtype` from one for float32.

    Parameters
    ----------
    mover : Mover
        Of float32.
    dtype : data type
        Of what is given and returned.
    """

    def __init__(self, mover: Mover, dtype: Any) -> None:
        self._mover = mover
        self._dtype = dtype
        self._owned: Array | None = None
        self._needed: Array | None = None

    def start(self, owned: Array) -> None:
        """See `Mover`."""
        self._owned = cast(owned, np.float32)
        self._mover.start(self._owned)

    def finish(self, owned: Array) -> Array:
        """See `Mover`."""
        wide, self._owned = self._owned, None
        return cast(self._mover.finish(wide), self._dtype)

    def start_back(self, needed: Array) -> None:
        """See `Mover`."""
        self._needed = cast(needed, np.float32)
        self._mover.start_back(self._needed)

    def finish_back(self, needed: Array, owned: Array) -> None:
        """See `Mover`."""
        wide, self._needed = self._needed, None
        total = arrays.empty(owned.shape, np.float32, like=owned)
        self._mover.finish_back(wide, total)
        owned[...] = cast(total, self._dtype)


def cast(x: Array, dtype: Any) -> Array:
    """Return an array as another type; itself where it is of that."""
    if x.dtype == dtype:
        return x
    return ops.cast(x, dtype) if x.size else arrays.empty(x.shape, dtype, like=x)
