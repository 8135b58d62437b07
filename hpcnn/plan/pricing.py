"""What a schedule costs on a machine, in seconds, found by walking through its steps with a clock for every rank.

A step of a rank begins when the rank and all whom it sends to or receives from have done their steps before. It lasts
as long as its messages: those in one direction follow one another at the rank's port, the two directions go on at the
same time. All that the ranks of a node send to other nodes in one step shares the node's link to the network, and
counts more (`Link.crossing`) unless they all exchange with the same nodes.

Up to `MOST_EXACT` ranks every rank has its clock. Above, steps are in lock step: each lasts as long as the slowest rank
takes, and only the ranks of a few whole nodes are looked at: the first, the middle and the last. Collectives of more
than `MOST_WALKED` ranks are priced by their flows instead (`flows.py`), of all ranks in lock step, if they are regular.
Where the machine has a `Fabric`, what ranks send to other nodes lasts at least as long as the busiest link above the
nodes needs for the messages of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf
from typing import NamedTuple

import numpy as np

from hpcnn.plan import schedules
from hpcnn.plan.flows import Shapes, shapes
from hpcnn.plan.machine import Machine
from hpcnn.plan.schedules import Schedule, Step

MOST_EXACT = 64
"""Ranks that have a clock each."""

MOST_WALKED = 32
"""Ranks up to which a collective is priced by the schedules of all; above, by its flows where it is regular."""

MOST_SAMPLED = 16
"""Ranks looked at where there are more, unless a single node has more."""


class Load(NamedTuple):
    """What one direction of a rank's step carries."""

    node_bytes: int = 0
    node_messages: int = 0
    network_bytes: int = 0
    network_messages: int = 0


class Traffic(NamedTuple):
    """A step of one rank, ready to be priced; bytes that are added are counted as they are added."""

    out: Load
    back: Load
    summing: bool
    peers: tuple[int, ...]
    """Ranks to be waited for."""
    routes: tuple[frozenset[int], frozenset[int]]
    """Other nodes to which the rank sends, and from which it receives."""
    away: tuple[tuple[int, int, int], ...] = ()
    """Where there is a fabric: own node, other node and bytes of what is sent to other nodes."""


def price(
    collective: Sequence[Schedule] | Callable[[int], Schedule],
    machine: Machine,
    nodes: Sequence[int],
    *,
    itemsize: int = 4,
    wire_bytes: int | None = None,
    limit_s: float = inf,
) -> float:
    """Return the seconds until the last rank is done, all ranks having started together.

    Parameters
    ----------
    collective : sequence of Schedule, or function from rank to Schedule
        The schedules of all ranks.
    machine : Machine
        What messages and additions cost.
    nodes : sequence of int
        The node of every rank; as long as there are ranks.
    itemsize, wire_bytes : int
        Bytes of an element in the array and (default: as many) in a message.
    limit_s : float
        Give up, and return infinity, as soon as it is certain to cost more than this.
    """
    size = len(nodes)
    schedule_of = collective if callable(collective) else collective.__getitem__
    pricer = _Pricer(machine, nodes, itemsize, wire_bytes or itemsize)
    if size == 1:
        return 0.0
    # What one rank does is a lower bound, for a fraction of the work.
    if machine.start_s + pricer.lock_step([schedule_of(0)], (0,), alone=True) > limit_s:
        return inf
    if size <= MOST_EXACT:
        seconds = pricer.clocks([schedule_of(rank) for rank in range(size)], limit_s)
    else:
        ranks = representatives(nodes)
        seconds = pricer.lock_step([schedule_of(rank) for rank in ranks], ranks)
    return machine.start_s + seconds


def representatives(nodes: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks of the first node, and of as many from both ends and the middle as may be looked at."""
    size = len(nodes)
    members: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    chosen = list(members[nodes[0]])
    taken = {nodes[0]}
    for distance in range(size):
        for rank in (size - 1 - distance, size // 2 + distance, distance):
            node = nodes[rank % size]
            if node in taken:
                continue
            if len(chosen) + len(members[node]) > MOST_SAMPLED:
                return tuple(sorted(chosen))
            taken.add(node)
            chosen += members[node]
    return tuple(sorted(chosen))


@lru_cache(maxsize=1024)
def allreduce_seconds(
    algorithm: str,
    count: int,
    machine: Machine,
    nodes: tuple[int, ...],
    itemsize: int = 4,
    wire_bytes: int | None = None,
    limit_s: float = inf,
) -> float:
    """Return what an all-reduce of `count` elements costs (see `price`)."""
    found = regular("allreduce", algorithm, machine, nodes)
    if found is not None:
        return found.seconds(machine, count, itemsize, wire_bytes or itemsize)

    def schedule_of(rank: int) -> Schedule:
        return schedules.allreduce(algorithm, rank, len(nodes), count, nodes=nodes)

    return price(schedule_of, machine, nodes, itemsize=itemsize, wire_bytes=wire_bytes, limit_s=limit_s)


@lru_cache(maxsize=1024)
def blocks_seconds(
    kind: str,
    algorithm: str,
    count: int,
    machine: Machine,
    nodes: tuple[int, ...],
    itemsize: int = 4,
    wire_bytes: int | None = None,
    limit_s: float = inf,
) -> float:
    """Return what an "allgather" or "reduce_scatter" of even blocks, `count` elements in all, costs (see `price`)."""
    found = regular(kind, algorithm, machine, nodes)
    if found is not None:
        return found.seconds(machine, count, itemsize, wire_bytes or itemsize)
    build = schedules.allgather if kind == "allgather" else schedules.reduce_scatter

    def schedule_of(rank: int) -> Schedule:
        return build(algorithm, rank, len(nodes), count, nodes=nodes)

    return price(schedule_of, machine, nodes, itemsize=itemsize, wire_bytes=wire_bytes, limit_s=limit_s)


def regular(kind: str, algorithm: str, machine: Machine, nodes: tuple[int, ...]) -> Shapes | None:
    """Return the shapes by which a collective is priced; None where it is priced by its schedules."""
    if len(nodes) <= MOST_WALKED:
        return None
    return shapes(kind, algorithm, nodes, machine.fabric, machine.link(same_node=False).crossing)


class _Pricer:
    """The prices of one machine for one map of ranks to nodes, remembered by length."""

    def __init__(self, machine: Machine, nodes: Sequence[int], itemsize: int, wire_bytes: int) -> None:
        self._nodes = nodes
        self._wire = wire_bytes
        self._gamma = machine.gamma_s_per_byte
        # Narrow messages are measured as so many bytes; that their elements grow wide before they are added is not.
        self._widening = self._gamma * max(0, itemsize - wire_bytes) / wire_bytes
        self._links = (machine.link(same_node=False), machine.link(same_node=True))
        self._shared = len(set(nodes)) < len(nodes) and len(set(nodes)) > 1
        self._seconds: dict[tuple[bool, float, int, bool], float] = {}
        self._fabric = machine.fabric
        self._number = {node: index for index, node in enumerate(dict.fromkeys(nodes))}
        if self._fabric is not None:
            self._fabric.check_nodes(len(self._number))

    def clocks(self, all_ranks: Sequence[Schedule], limit_s: float) -> float:
        """Return when the last rank's clock stops, each waiting for its partners only."""
        ranks = range(len(all_ranks))
        times = [0.0] * len(all_ranks)
        for steps in zip(*(schedule.steps for schedule in all_ranks), strict=True):
            traffic = [self._traffic(rank, step) for rank, step in zip(ranks, steps, strict=True)]
            costs = self._costs(ranks, traffic)
            before = times
            times = [
                max([before[rank], *(before[peer] for peer in one.peers)]) + cost if one.peers else before[rank]
                for rank, one, cost in zip(ranks, traffic, costs, strict=True)
            ]
            if max(times) > limit_s:
                return inf
        return max(times)

    def lock_step(self, some: Sequence[Schedule], ranks: Sequence[int], *, alone: bool = False) -> float:
        """Return the sum over all steps of the slowest rank's time, or with `alone` as if the nodes had one rank."""
        total = 0.0
        shared, self._shared = self._shared, self._shared and not alone
        for steps in zip(*(schedule.steps for schedule in some), strict=True):
            total += max(self._costs(ranks, [self._traffic(rank, step) for rank, step in zip(ranks, steps)]))
        self._shared = shared
        return total

    def _traffic(self, rank: int, step: Step) -> Traffic:
        nodes, here, wire = self._nodes, self._nodes[rank], self._wire
        loads, peers, routes = [], [], []
        away: tuple[tuple[int, int, int], ...] = ()
        if self._fabric is not None:
            number = self._number
            away = tuple(
                (number[here], number[nodes[peer]], (stop - start) * wire)
                for peer, start, stop in step.sends
                if nodes[peer] != here
            )
        for transfers in (step.sends, step.receives):
            node_bytes = node_messages = network_bytes = network_messages = 0
            for peer, start, stop in transfers:
                peers.append(peer)
                if nodes[peer] == here:
                    node_bytes += (stop - start) * wire
                    node_messages += 1
                else:
                    network_bytes += (stop - start) * wire
                    network_messages += 1
            loads.append(Load(node_bytes, node_messages, network_bytes, network_messages))
            routes.append(frozenset([nodes[peer] for peer, _, _ in transfers if nodes[peer] != here]))
        return Traffic(loads[0], loads[1], step.combine == "sum", tuple(peers), (routes[0], routes[1]), away)

    def _costs(self, ranks: Sequence[int], traffic: Sequence[Traffic]) -> list[float]:
        """Return the seconds of one step of each rank."""
        above, hops_s = self._above(traffic)
        if not self._shared:
            return [
                max(
                    self._direction(t.out, max(above, t.out.network_bytes), t.summing, hops_s),
                    self._back(t, max(above, t.back.network_bytes), hops_s),
                )
                for t in traffic
            ]
        out: dict[int, int] = {}
        back: dict[int, int] = {}
        routes: dict[int, set[object]] = {}
        here = [self._nodes[rank] for rank in ranks]
        for node, t in zip(here, traffic, strict=True):
            out[node] = out.get(node, 0) + t.out.network_bytes
            back[node] = back.get(node, 0) + t.back.network_bytes
            if t.out.network_messages or t.back.network_messages:
                routes.setdefault(node, set()).add(t.routes)
        for node in [node for node, several in routes.items() if len(several) > 1]:
            out[node] = round(self._links[False].crossing * out[node])
            back[node] = round(self._links[False].crossing * back[node])
        return [
            max(
                self._direction(t.out, max(above, out[node]), t.summing, hops_s),
                self._back(t, max(above, back[node]), hops_s),
            )
            for node, t in zip(here, traffic, strict=True)
        ]

    def _above(self, traffic: Sequence[Traffic]) -> tuple[float, float]:
        """Return the bytes that the busiest link above the nodes passes, as a node's port would, and its seconds."""
        sent = [one for t in traffic for one in t.away]
        if self._fabric is None or not sent:
            return 0.0, 0.0
        source, target, num_bytes = np.array(sent).T
        passage = self._fabric.passage(source, target, num_bytes)
        return passage.busiest, passage.hops * self._fabric.hop_s

    def _back(self, traffic: Traffic, on_link: float, hops_s: float) -> float:
        load = traffic.back
        seconds = self._direction(load, on_link, traffic.summing, hops_s)
        if traffic.summing and self._widening:
            seconds += self._widening * (load.node_bytes + load.network_bytes)
        return seconds

    def _direction(self, load: Load, on_link: float, summing: bool, hops_s: float) -> float:
        """Return the seconds of one direction, `on_link` bytes in all being on the busiest link of the network."""
        seconds = 0.0
        if load.node_messages:
            seconds += self._messages(True, load.node_bytes, load.node_bytes, load.node_messages, summing)
        if load.network_messages:
            seconds += self._messages(False, on_link, load.network_bytes, load.network_messages, summing) + hops_s
        return seconds

    def _messages(self, same_node: bool, num_bytes: float, own_bytes: int, count: int, summing: bool) -> float:
        key = (same_node, num_bytes, own_bytes, summing)
        seconds = self._seconds.get(key)
        link = self._links[same_node]
        if seconds is None:
            seconds = link.seconds(num_bytes, summing=summing, gamma_s_per_byte=self._gamma, own_bytes=own_bytes)
            self._seconds[key] = seconds
        return seconds + (count - 1) * link.alpha_s
