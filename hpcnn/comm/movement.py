"""Movements over MPI: what is owned is packed, sent and unpacked; on the way back it is packed, sent and added.

Both ways are collectives of the engine, prepared once for one shape and started every step. A plain all-gather and its
adjoint, the reduce-scatter, run on the algorithm that is asked for, in place; everything else goes straight from owner
to reader.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm.collective import Collective
from hpcnn.comm.engine import Engine
from hpcnn.comm.persistent import prepare_allgather, prepare_reduce_scatter
from hpcnn.plan.layout import extent, volume, within
from hpcnn.plan.movement import Movement, Parcel
from hpcnn.plan.schedules import Schedule
from hpcnn.plan.schedules.schedule import Step, Transfer


class Mover(Protocol):
    """A movement on this rank. Each start is followed by its finish; the two ways are never in flight together."""

    def start(self, owned: Array) -> None:
        """Send what this rank owns; `owned` may change afterwards."""

    def finish(self, owned: Array) -> Array:
        """Return what this rank needs, having waited for it; `owned` is what was started with."""

    def start_back(self, needed: Array) -> None:
        """Send back gradients of what this rank needs; `needed` may change afterwards."""

    def finish_back(self, needed: Array, owned: Array) -> None:
        """Overwrite `owned` with the sum of all ranks' gradients; `needed` is what was started with."""


def prepare(
    engine: Engine,
    movement: Movement,
    dtype: np.dtype,
    *,
    label: str,
    back: str = "",
    algorithm: str = "auto",
    priority: int = 0,
    like: Array | None = None,
) -> Mover:
    """Return a movement's mover (collective).

    Parameters
    ----------
    engine : Engine
        Carries it on.
    movement : Movement
        Equal on all ranks.
    dtype : data type
        Of the tensor.
    label : str
        What travels, for people.
    back : str
        What travels back; left out, its gradient.
    algorithm : str
        For an all-gather and its reduce-scatter.
    priority : int
        See `Engine.prepare`.
    like : Array, optional
        The tensor lives where this one does; left out, on the host.
    """
    labels = label, back or f"gradient of {label}"
    bounds = movement.gathered()
    if bounds is not None:
        return _Gather(engine, movement, dtype, bounds, algorithm, labels, priority, like)
    return _Parcels(engine, movement, dtype, labels, priority, like)


class _Gather:
    """One box that all ranks need, each having a piece of it.

    The pieces travel one after the other in one array. Where they are rows of the box, rank after rank, that array is
    the box itself.
    """

    def __init__(
        self,
        engine: Engine,
        movement: Movement,
        dtype: np.dtype,
        bounds: list[int],
        algorithm: str,
        labels: tuple[str, str],
        priority: int,
        like: Array | None,
    ) -> None:
        whole = movement.target[0]
        self._shape = extent(whole)
        self._pieces = [
            (slice(start, stop), within(box, whole), extent(box))
            for box, (start, stop) in zip(movement.source, pairwise(bounds), strict=True)
            if volume(box)
        ]
        width = volume(whole) // whole[0].size
        self._rows = all(
            box[1:] == whole[1:] and (box[0].start - whole[0].start) * width == start
            for box, start in zip(movement.source, bounds, strict=False)
            if volume(box)
        )
        # The reader keeps what it got until it has its weights' gradient, which may be after gradients went back.
        self._there, self._back = (arrays.empty(bounds[-1], dtype, like=like) for _ in range(2))
        self._mine = slice(*bounds[engine.rank : engine.rank + 2])
        self._gather = prepare_allgather(engine, self._there, bounds, algorithm, label=labels[0], priority=priority)
        self._sum = prepare_reduce_scatter(engine, self._back, bounds, algorithm, label=labels[1], priority=priority)

    def start(self, owned: Array) -> None:
        self._there[self._mine].reshape(owned.shape)[...] = owned
        self._gather.start()

    def finish(self, owned: Array) -> Array:
        self._gather.wait()
        if self._rows:
            return self._there.reshape(self._shape)
        needed = arrays.empty(self._shape, self._there.dtype, like=self._there)
        for piece, place, shape in self._pieces:
            needed[place] = self._there[piece].reshape(shape)
        return needed

    def start_back(self, needed: Array) -> None:
        for piece, place, shape in self._pieces:
            self._back[piece].reshape(shape)[...] = needed[place]
        self._sum.start()

    def finish_back(self, needed: Array, owned: Array) -> None:
        self._sum.wait()
        owned[...] = self._back[self._mine].reshape(owned.shape)


class _Parcels:
    """Boxes that go straight from their owner to whoever needs them, all at once."""

    def __init__(
        self,
        engine: Engine,
        movement: Movement,
        dtype: np.dtype,
        labels: tuple[str, str],
        priority: int,
        like: Array | None,
    ) -> None:
        rank = engine.rank
        self._source, self._target = movement.source[rank], movement.target[rank]
        self._kept = movement.kept(rank)
        sends, receives = movement.sends(rank), movement.receives(rank)
        bounds = list(accumulate((volume(parcel.box) for parcel in (*sends, *receives)), initial=0))
        self._staging = arrays.empty(bounds[-1], dtype, like=like)
        self._away = [(p, self._piece(p, bounds[i])) for i, p in enumerate(sends)]
        self._home = [(p, self._piece(p, bounds[len(sends) + i])) for i, p in enumerate(receives)]
        away = tuple(Transfer(p.peer, *bounds[i : i + 2]) for i, p in enumerate(sends))
        home = tuple(Transfer(p.peer, *bounds[len(sends) + i : len(sends) + i + 2]) for i, p in enumerate(receives))

        def collective(step: Step, what: str) -> Collective:
            schedule = Schedule((step,), bounds[-1], local=True)
            return engine.prepare(schedule, self._staging, label=what, priority=priority)

        self._there = collective(Step(away, home), labels[0])
        self._back = collective(Step(home, away), labels[1])

    def start(self, owned: Array) -> None:
        for parcel, piece in self._away:
            piece[...] = owned[within(parcel.box, self._source)]
        self._there.start()

    def finish(self, owned: Array) -> Array:
        needed = arrays.empty(extent(self._target), self._staging.dtype, like=self._staging)
        if volume(self._kept):
            needed[within(self._kept, self._target)] = owned[within(self._kept, self._source)]
        self._there.wait()
        for parcel, piece in self._home:
            needed[within(parcel.box, self._target)] = piece
        return needed

    def start_back(self, needed: Array) -> None:
        for parcel, piece in self._home:
            piece[...] = needed[within(parcel.box, self._target)]
        self._back.start()

    def finish_back(self, needed: Array, owned: Array) -> None:
        owned[...] = 0
        if volume(self._kept):
            owned[within(self._kept, self._source)] = needed[within(self._kept, self._target)]
        self._back.wait()
        for parcel, piece in sorted(self._away, key=lambda one: one[0].peer):
            owned[within(parcel.box, self._source)] += piece

    def _piece(self, parcel: Parcel, start: int) -> Array:
        return self._staging[start : start + volume(parcel.box)].reshape(extent(parcel.box))
