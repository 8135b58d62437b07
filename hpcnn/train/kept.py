"""The state of a finished step, kept in the memory of all ranks for the case that some of them die.

Each rank copies what it has. What no other has, slices of the optimizer's state and parts of cut layers, it also sends
to a rank on another node: whatever a node takes with it can be put together from the others. There are two copies, of
the last two steps that were kept: while one is made the other is complete everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm.world import World
from hpcnn.geometry import Block, slices
from hpcnn.nn.parameter import ParameterSet
from hpcnn.spec import Part, whole
from hpcnn.train.checkpoint import Checkpoint, slots_of
from hpcnn.train.setup import Parts

VALUES, STATISTICS = "parameters", "statistics"
"""Names of the flat vectors beside the optimizer's slots."""


class _Copy(NamedTuple):
    """State after a step: flat vectors of this rank, and packed what it keeps for another."""

    step: int
    best_accuracy: float
    lazy_steps: int
    lr_scale: float
    mine: dict[str, np.ndarray]
    others: np.ndarray


class Keeper:
    """Keeps copies of a run's state, for ranks that outlive others (collective to make).

    Parameters
    ----------
    parts : Parts
        Model, plan and exchange say who has what.
    state : dict of str to Array, shape (count,)
        The optimizer's.
    """

    def __init__(self, parts: Parts, state: Mapping[str, Array]) -> None:
        program, world = parts.program, parts.world
        self._program, self._state, self._world = program, state, world
        self._every, self._total = parts.config.fault.keep_every_steps, parts.total_steps
        world.outlive()
        model, exchange = program.model, program.exchange
        cut = any(number > 1 for number in program.plan.cut.values())
        self._distance = distance(world.hostnames)
        self._kept_rank = (world.rank - self._distance) % world.size
        self._copies: list[_Copy] = []
        # Of every rank, the stretches of its vectors that others lack; empty if every rank has everything.
        self._stretches: list[dict[str, tuple[Block, ...]]] = []
        if world.size > 1 and (cut or not exchange.owns_whole_tensors):
            mine = dict.fromkeys(state, exchange.owned)
            if cut:
                count = sum(array.size for array in model.statistics.values())
                mine[VALUES], mine[STATISTICS] = (Block(0, model.parameters.values.size),), (Block(0, count),)
            self._stretches = world.broadcast_obj(world.gather_obj(mine))

    def due(self, step: int) -> bool:
        """Return whether the state after so many steps is to be kept."""
        return step % self._every == 0 and step < self._total and self._program.exchange.complete

    def keep(self, step: int, best_accuracy: float, lr_scale: float = 1.0) -> None:
        """Copy the state after so many steps, which all ranks have finished (collective)."""
        old = self._copies.pop(0) if len(self._copies) == 2 else None
        live = {VALUES: self._program.model.parameters.values, **self._state}
        mine = {name: np.empty(flat.shape, flat.dtype) for name, flat in live.items()} if old is None else old.mine
        for name, flat in live.items():
            mine[name][...] = arrays.to_host(flat)
        statistics = [arrays.to_host(array).reshape(-1) for array in self._program.model.statistics.values()]
        mine[STATISTICS] = np.concatenate(statistics) if statistics else np.empty(0, np.float32)
        others = np.empty(0, np.uint8)
        if self._stretches:
            parts = [mine[name][slice(*block)].view(np.uint8) for name, block in self._cuts(self._world.rank)]
            others = np.empty(sum(self._sizes(self._kept_rank, mine)), np.uint8) if old is None else old.others
            self._world.pass_on(np.concatenate(parts), others, self._distance)
        self._copies.append(_Copy(step, best_accuracy, self._program.exchange.round_steps, lr_scale, mine, others))

    def collect(self, survivors: World) -> Checkpoint | None:
        """Return, on the first of the survivors, the last state that is complete (collective among them).

        None there if there is none: ranks died together with those that kept copies for them. None elsewhere.
        """
        steps = [copy.step for copy in self._copies]
        newest = survivors.gather_obj(steps[-1] if steps else -1)
        step = survivors.broadcast_obj(min(newest or [-1]))
        if step < 0:
            return None
        copy = self._copies[steps.index(step)]  # whoever has the next copy has this one too
        if not self._stretches:
            return self._checkpoint(copy, copy.mine, self._program.model.parts) if survivors.rank == 0 else None
        held = {self._kept_rank: self._unpacked(copy)}
        held[self._world.rank] = [copy.mine[name][slice(*block)] for name, block in self._cuts(self._world.rank)]
        everyone = survivors.gather_obj(held)
        if everyone is None:
            return None
        return self._merged(copy, {rank: found for some in everyone for rank, found in some.items()})

    def _cuts(self, rank: int) -> list[tuple[str, Block]]:
        """Return a rank's stretches, with the names of their vectors, in the order in which they are packed."""
        return [(name, block) for name, blocks in self._stretches[rank].items() for block in blocks]

    def _sizes(self, rank: int, mine: Mapping[str, np.ndarray]) -> list[int]:
        """Return the bytes of a rank's stretches."""
        return [mine[name].itemsize * block.size for name, block in self._cuts(rank)]

    def _unpacked(self, copy: _Copy) -> list[np.ndarray]:
        """Return the stretches that are kept for another rank."""
        bounds = pairwise(accumulate(self._sizes(self._kept_rank, copy.mine), initial=0))
        names = [name for name, _ in self._cuts(self._kept_rank)]
        return [
            copy.others[start:stop].view(copy.mine[name].dtype)
            for name, (start, stop) in zip(names, bounds, strict=True)
        ]

    def _merged(self, copy: _Copy, held: Mapping[int, Sequence[np.ndarray]]) -> Checkpoint | None:
        """Put the state together out of ranks' stretches; None if some of it is nowhere."""
        spec, plan = self._program.model.spec, self._program.plan
        parts = [whole(layer) for layer in spec.layers]
        room, known = dict(copy.mine), {}
        for name in self._stretches[0]:
            size = _layout(name, parts).values.size
            room[name], known[name] = np.zeros(size, copy.mine[name].dtype), np.zeros(size, bool)
        for rank, stretches in held.items():
            theirs = plan.parts(spec, rank)
            places = {
                f"{layer.name}/{short}": slices(box)
                for layer, part in zip(spec.layers, theirs, strict=True)
                for short, box in part.tensors.items()
            }
            found = iter(stretches)
            for name, blocks in self._stretches[rank].items():
                layout, target = _layout(name, theirs), _layout(name, parts)
                flat = np.zeros(layout.values.size, room[name].dtype)
                there = np.zeros(flat.size, bool)
                for block in blocks:
                    flat[slice(*block)], there[slice(*block)] = next(found), True
                for tensor, place in ((one.name, places[one.name]) for one in layout.parameters):
                    mask = layout.view(there, tensor)
                    np.copyto(target.view(room[name], tensor)[place], layout.view(flat, tensor), where=mask)
                    target.view(known[name], tensor)[place] |= mask
        return self._checkpoint(copy, room, parts) if all(one.all() for one in known.values()) else None

    def _checkpoint(self, copy: _Copy, room: Mapping[str, np.ndarray], parts: Sequence[Part]) -> Checkpoint:
        """Return a checkpoint of global flat vectors."""
        trained, statistics = _layout(VALUES, parts), _layout(STATISTICS, parts)
        return Checkpoint(
            model=self._program.model.spec.name,
            parameters={one.name: trained.view(room[VALUES], one.name) for one in trained.parameters},
            statistics={one.name: statistics.view(room[STATISTICS], one.name) for one in statistics.parameters},
            optimizer=slots_of({slot: room[slot] for slot in self._state}, trained),
            step=copy.step,
            best_accuracy=copy.best_accuracy,
            lazy_steps=copy.lazy_steps,
            lr_scale=copy.lr_scale,
        )


def distance(hostnames: Sequence[str]) -> int:
    """Return how many ranks ahead of each is one on another node; 1 if there is no such number."""
    size = len(hostnames)
    return next(
        (far for far in range(1, size) if all(hostnames[rank] != hostnames[rank - far] for rank in range(size))), 1
    )


def _layout(name: str, parts: Sequence[Part]) -> ParameterSet:
    """Return how the tensors of such parts lie in the vector of that name."""
    if name != STATISTICS:
        return ParameterSet.of([part.spec for part in parts], np.uint8)
    shapes = ((f"{part.spec.name}/{short}", shape) for part in parts for short, shape in part.spec.statistics.items())
    return ParameterSet(((tensor, shape, False) for tensor, shape in shapes), np.uint8)
