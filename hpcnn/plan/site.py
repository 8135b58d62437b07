"""Where and how a plan runs, and what its messages cost there: movements between layers, and sums over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from hpcnn.config import Config
from hpcnn.plan import choice, pricing, schedules
from hpcnn.plan.buckets import FLOAT_BYTES, Bucket
from hpcnn.plan.layout import volume
from hpcnn.plan.machine import DEFAULT, Machine
from hpcnn.plan.movement import Movement, Parcel
from hpcnn.plan.schedules import Schedule
from hpcnn.plan.schedules.schedule import Step, Transfer
from hpcnn.plan.work import Clock
from hpcnn.spec import ModelSpec


class Journey(NamedTuple):
    """One collective or movement: seconds, and bytes and messages that the busiest rank looked at sends."""

    seconds: float = 0.0
    num_bytes: int = 0
    num_messages: int = 0

    def and_then(self, other: Journey) -> Journey:
        """Return both, one after the other."""
        return Journey(
            self.seconds + other.seconds, self.num_bytes + other.num_bytes, self.num_messages + other.num_messages
        )


NOWHERE = Journey()
"""Nothing is sent."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A machine, the nodes of its ranks, and the settings by which gradients travel.

    Attributes
    ----------
    machine : Machine
        What messages and computation cost.
    nodes : tuple of int
        The node of every rank.
    algorithm : str
        `exchange.algorithm`; the MPI library's own, and NVIDIA's, are priced as the cheapest of ours.
    overlap, lazy : bool
        Whether messages travel beside the computation, and layers wait for their own parameters only.
    sync_batchnorm : bool
        Whether batch norms sum their statistics over ranks.
    state_slots : int
        Numbers that the optimizer keeps for each parameter.
    wire_bytes : int
        Of an element of a gradient in messages.
    """

    machine: Machine = DEFAULT
    nodes: tuple[int, ...]
    algorithm: str = "auto"
    overlap: bool = True
    lazy: bool = True
    sync_batchnorm: bool = True
    state_slots: int = 1
    wire_bytes: int = FLOAT_BYTES

    @classmethod
    def of(cls, config: Config, machine: Machine, nodes: tuple[int, ...]) -> Site:
        """Return the site that a configuration's ranks find on `nodes`."""
        exchange = config.exchange
        return cls(
            machine=machine,
            nodes=nodes,
            algorithm="auto" if exchange.algorithm == "nccl" else exchange.algorithm,
            overlap=exchange.overlap,
            lazy=exchange.wait == "layer",
            sync_batchnorm=config.model.sync_batchnorm,
            state_slots=2 if config.train.optimizer.startswith("adam") else 1,
            wire_bytes=FLOAT_BYTES if exchange.wire == "fp32" else FLOAT_BYTES // 2,
        )

    @cached_property
    def clock(self) -> Clock:
        """What passes of layers cost."""
        return Clock(self.machine)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    def looked_at(self) -> tuple[int, ...]:
        """Return the ranks whose computation is priced: all, or of many the ends and the middle."""
        return self._looked_at

    @cached_property
    def _looked_at(self) -> tuple[int, ...]:
        return tuple(range(self.ranks)) if self.ranks <= 16 else pricing.representatives(self.nodes)

    def moved(self, movement: Movement) -> tuple[Journey, Journey]:
        """Return what a movement costs there and back."""
        if self.ranks == 1:
            return NOWHERE, NOWHERE
        bounds = movement.gathered()
        if bounds is not None:
            count = bounds[-1]
            return self.blocks("allgather", count, self.nodes), self.blocks("reduce_scatter", count, self.nodes)
        return _parcels_journeys(movement, self.machine, self.nodes, self.looked_at())

    def blocks(self, kind: str, count: int, nodes: tuple[int, ...], wire_bytes: int = FLOAT_BYTES) -> Journey:
        """Return what an "allgather" or "reduce_scatter" of `count` elements costs among ranks on `nodes`."""
        size, name = len(nodes), self.algorithm
        if size == 1 or not count:
            return NOWHERE
        if name in ("auto", "mpi"):
            name = choice.block_algorithm(
                count * FLOAT_BYTES, size, self.machine, nodes, kind=kind, wire_bytes=wire_bytes
            )
        elif name == "halving-doubling":
            name = "butterfly"
        seconds = pricing.blocks_seconds(kind, name, count, self.machine, nodes, wire_bytes=wire_bytes)
        found = pricing.regular(kind, name, self.machine, nodes)
        if found is not None:
            return _journey(seconds, *found.sent(count), wire_bytes)
        build = schedules.allgather if kind == "allgather" else schedules.reduce_scatter
        return _busiest(seconds, [build(name, rank, size, count, nodes=nodes) for rank in _few(size)], wire_bytes)

    def summed(
        self,
        count: int,
        nodes: tuple[int, ...],
        itemsize: int = FLOAT_BYTES,
        algorithm: str = "",
        wire_bytes: int | None = None,
    ) -> Journey:
        """Return what an all-reduce of `count` elements costs among ranks on `nodes`."""
        size, name = len(nodes), algorithm or self.algorithm
        if size == 1 or not count:
            return NOWHERE
        if name in ("auto", "mpi"):
            name = choice.allreduce_algorithm(
                count * itemsize, size, self.machine, nodes, itemsize=itemsize, wire_bytes=wire_bytes
            )
        seconds = pricing.allreduce_seconds(name, count, self.machine, nodes, itemsize, wire_bytes)
        found = pricing.regular("allreduce", name, self.machine, nodes)
        if found is not None:
            return _journey(seconds, *found.sent(count), wire_bytes or itemsize)
        some = [schedules.allreduce(name, rank, size, count, nodes=nodes) for rank in _few(size)]
        return _busiest(seconds, some, wire_bytes or itemsize)

    def exchanged(self, bucket: Bucket, model: ModelSpec, global_batch: int) -> tuple[Journey, Journey]:
        """Return what a bucket's gradients cost to become global, and its parameters to become current."""
        nodes = self.nodes[:: bucket.cut]
        if len(nodes) == 1:
            return NOWHERE, NOWHERE
        if bucket.kind == "allreduce":
            return self.summed(bucket.size, nodes, wire_bytes=self.wire_bytes), NOWHERE
        gather = self.blocks("allgather", bucket.size, nodes)
        if bucket.kind == "sharded":
            return self.blocks("reduce_scatter", bucket.size, nodes, self.wire_bytes), gather
        layer = next(layer for layer in model.layers if layer.name == bucket.layers[0])
        num_out, num_in = layer.parameters["weight"]
        # Inputs left during forward already; of the two, errors are what backward waits for.
        inputs = self.blocks("reduce_scatter", -(-global_batch // len(nodes)) * num_in, nodes, self.wire_bytes)
        errors = self.blocks("allgather", global_batch * num_out, nodes, self.wire_bytes)
        return inputs.and_then(errors), gather


def _journey(seconds: float, num_elements: int, num_messages: int, itemsize: int) -> Journey:
    return Journey(seconds, num_elements * itemsize, num_messages)


def _busiest(seconds: float, some: Sequence[Schedule], itemsize: int) -> Journey:
    busiest = max(some, key=lambda schedule: (schedule.num_elements_sent, schedule.num_messages))
    return _journey(seconds, busiest.num_elements_sent, busiest.num_messages, itemsize)


def _few(size: int) -> tuple[int, ...]:
    return tuple(sorted({0, 1 % size, size // 2, size - 1}))


def _parcels(movement: Movement, rank: int) -> Schedule:
    """Return the messages of a rank in a movement that is no gather, as `comm.movement` sends them."""
    sends, place = [], 0
    for parcel in movement.sends(rank):
        sends.append(_transfer(parcel, place))
        place = sends[-1].stop
    receives = []
    for parcel in movement.receives(rank):
        receives.append(_transfer(parcel, place))
        place = receives[-1].stop
    return Schedule((Step(tuple(sends), tuple(receives)),), place, local=True)


def _transfer(parcel: Parcel, start: int) -> Transfer:
    return Transfer(parcel.peer, start, start + volume(parcel.box))


@lru_cache(maxsize=4096)
def _parcels_journeys(
    movement: Movement, machine: Machine, nodes: tuple[int, ...], looked_at: tuple[int, ...]
) -> tuple[Journey, Journey]:
    there = [_parcels(movement, rank) for rank in looked_at]
    seconds = pricing.price(lambda rank: _parcels(movement, rank), machine, nodes)
    sent = max(there, key=lambda schedule: schedule.num_elements_sent)
    fetched = max(there, key=lambda schedule: schedule.count - schedule.num_elements_sent)
    return (
        Journey(seconds, sent.num_elements_sent * FLOAT_BYTES, sent.num_messages),
        Journey(
            seconds,
            (fetched.count - fetched.num_elements_sent) * FLOAT_BYTES,
            sum(len(step.receives) for step in fetched.steps),
        ),
    )
