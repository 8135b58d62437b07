"""All-reduces of device arrays by NVIDIA's library, from GPU to GPU: beside the kernels, without the host.

NCCL wants its calls in the same order on all ranks. So does nothing else here; but the sums of gradients, which it is
for, start as backward comes to them, and all ranks run the same program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpcnn import arrays, gpu
from hpcnn.arrays import Array
from hpcnn.comm.collective import Collective
from hpcnn.comm.counters import Traffic
from hpcnn.errors import CommError

if TYPE_CHECKING:
    from hpcnn.comm.engine import Engine


class OfNccl(Collective):
    """A sum on the stream of the copies."""

    def __init__(self, engine: Engine, array: Array, members: gpu.Nccl, label: str, priority: int) -> None:
        super().__init__(engine, label, priority, Traffic(1, array.nbytes))
        self._copies = engine.device_copies()
        self._array, self._members = array, members
        self._summed: gpu.Event | None = None

    def begin(self) -> None:
        """Begin to sum, behind the kernels that make the array."""
        super().begin()
        self._copies.after_kernels()
        self._copies.beside(lambda stream: self._members.sum(self._array, stream))
        self._summed = self._copies.event()

    def advance(self) -> bool:
        """Look whether the sum is there."""
        if self._summed is None or not self._summed.done:
            return False
        self._summed = None
        self.num_moved += 1
        self._finish()
        return True


def prepare(engine: Engine, array: Array, *, label: str, priority: int, ranks: Sequence[int] | None) -> Collective:
    """Return the all-reduce of a flat device array among `ranks`, or all (collective).

    Raises
    ------
    CommError
        On all ranks, if the array is on the host or not of float32, or two ranks have one GPU.
    """
    if not arrays.on_device(array) or array.dtype != np.float32:
        raise CommError(
            f"comm: algorithm 'nccl' sums float32 arrays on GPUs, not {array.dtype} of {type(array).__name__}."
            ' Set exchange.algorithm = "auto", which serves all.'
        )
    group = tuple(range(engine.size) if ranks is None else ranks)
    if group not in engine.nccl_members:
        places = engine.comm.allgather((engine.nodes[engine.rank], gpu.identity()))
        if len(set(places)) < len(places):
            raise CommError(
                f"comm: algorithm 'nccl' needs a GPU for each rank; {len(places)} ranks have {len(set(places))}."
                ' Start one rank for each GPU, or set exchange.algorithm = "auto".'
            )
        keys = engine.comm.allgather(gpu.Nccl.key() if engine.rank == group[0] else None)
        engine.nccl_members[group] = gpu.Nccl(len(group), group.index(engine.rank), keys[group[0]])
    return engine.keep(OfNccl(engine, array, engine.nccl_members[group], label, priority))
