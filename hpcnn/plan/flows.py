"""Collectives of any number of ranks as a few flows: equal messages that many ranks send at once, so many times over.

A schedule says of one rank what it sends; to price thousands of ranks by their schedules would take hours. But every
algorithm is regular: in a step all messages have the same length to within one element, and a ring's steps are all
alike. So a step is two arrays of ranks and a length (`Flow`), and what decides its price, how many messages share
which links, does not depend on the length at all: it is found once (`shapes`) and serves all arrays.

These are the schedules of `plan.schedules` written once more, for all ranks; tests hold the two together.
Legend: P ranks, s of each node, M nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np

from hpcnn.plan.fabric import Fabric
from hpcnn.plan.machine import Machine

Ranks: TypeAlias = np.ndarray


class Flow(NamedTuple):
    """Messages that ranks `sources` send to ranks `targets`, none twice in either."""

    sources: Ranks
    targets: Ranks
    parts: int = 1
    of: int = 1
    """Each message carries a run of `parts` blocks, the array being cut into `of`."""
    summing: bool = False
    repeat: int = 1
    """How often, one after the other."""
    messages: int = 1
    """Into how many pieces the longest is cut, as it does not lie in one stretch."""


class Shape(NamedTuple):
    """What of a flow decides its price."""

    parts: int
    of: int
    summing: bool
    messages: int
    same_node: bool
    """Whether any message stays within a node."""
    on_link: float
    """How many messages' bytes the busiest link of the network has to pass; 0: nothing leaves a node."""
    hops: int

    def elements(self, count: int) -> int:
        """Return the length of the longest message, the array having `count` elements."""
        return self.parts * (count // self.of) + min(self.parts, count % self.of)


class Shapes(NamedTuple):
    """A collective, ready to be priced for any length."""

    steps: tuple[tuple[Shape, int], ...]
    """Each with how often it occurs."""
    busiest: tuple[Shape, ...]
    """What the rank sends that sends most."""
    repeats: tuple[int, ...]

    def seconds(self, machine: Machine, count: int, itemsize: int, wire_bytes: int) -> float:
        """Return what it costs, every step lasting as long as on the rank where it is longest."""
        gamma, total = machine.gamma_s_per_byte, machine.start_s
        widening = gamma * max(0, itemsize - wire_bytes) / wire_bytes
        for shape, repeat in self.steps:
            num_bytes = shape.elements(count) * wire_bytes
            if not num_bytes:
                continue
            step_s = 0.0
            for same_node, share in ((True, float(shape.same_node)), (False, shape.on_link)):
                link = machine.link(same_node=same_node)
                if share:
                    seconds = link.seconds(
                        share * num_bytes, summing=shape.summing, gamma_s_per_byte=gamma, own_bytes=num_bytes
                    )
                    hops_s = 0.0 if same_node or machine.fabric is None else shape.hops * machine.fabric.hop_s
                    step_s = max(step_s, seconds + (shape.messages - 1) * link.alpha_s + hops_s)
            total += repeat * (step_s + (widening * num_bytes if shape.summing else 0.0))
        return total

    def sent(self, count: int) -> tuple[int, int]:
        """Return the elements and messages that the busiest rank sends."""
        every = [(shape.elements(count), shape.messages, n) for shape, n in zip(self.busiest, self.repeats)]
        return sum(elements * n for elements, _, n in every), sum(m * n for elements, m, n in every if elements)


@lru_cache(maxsize=256)
def shapes(kind: str, algorithm: str, nodes: tuple[int, ...], fabric: Fabric | None, crossing: float) -> Shapes | None:
    """Return the shapes of a collective, or None where it is not regular enough.

    Parameters
    ----------
    kind : str
        "allreduce", "allgather" or "reduce_scatter".
    algorithm, nodes
        As for `schedules.allreduce`.
    fabric, crossing
        `Machine.fabric`, and `Link.crossing` of its network.
    """
    flows = flows_of(kind, algorithm, nodes)
    if flows is None:
        return None
    where = np.unique(np.asarray(nodes), return_inverse=True)[1]
    first = np.full(where.max() + 1, len(nodes))
    np.minimum.at(first, where, np.arange(len(nodes)))
    where = np.argsort(np.argsort(first))[where]  # numbered as the ranks meet them
    if fabric is not None:
        fabric.check_nodes(len(first))
    found: Counter[Shape] = Counter()
    sends = np.zeros(len(nodes))
    every = []
    for flow in flows:
        shape = _shape(flow, where, fabric, crossing)
        found[shape] += flow.repeat
        sends[flow.sources] += flow.repeat * flow.parts / flow.of
        every.append(shape)
    busiest = int(sends.argmax())
    own: Counter[Shape] = Counter()
    for flow, shape in zip(flows, every, strict=True):
        if flow.sources.size == len(nodes) or (flow.sources == busiest).any():
            own[shape] += flow.repeat
    return Shapes(tuple(found.items()), tuple(own), tuple(own.values()))


def _shape(flow: Flow, where: np.ndarray, fabric: Fabric | None, crossing: float) -> Shape:
    source, target = where[flow.sources], where[flow.targets]
    away = source != target
    on_link, hops, num_nodes = 0.0, 0, int(where.max()) + 1
    if away.any():
        source, target = source[away], target[away]
        loads = np.maximum(np.bincount(source, minlength=num_nodes), np.bincount(target, minlength=num_nodes))
        if 1 < num_nodes < len(where) and crossing > 1.0:
            loads = np.where(_mixed(flow, where, away), loads * crossing, loads)
        on_link = float(loads.max())
        if fabric is not None:
            passage = fabric.passage(source, target, np.ones(source.size))
            on_link, hops = max(on_link, passage.busiest), passage.hops
    return Shape(flow.parts, flow.of, flow.summing, flow.messages, not away.all(), on_link, hops)


def _mixed(flow: Flow, where: np.ndarray, away: np.ndarray) -> np.ndarray:
    """Return of which nodes the ranks that use the network do not all exchange with the same nodes."""
    size, num_nodes = len(where), int(where.max()) + 1
    to, back = np.full(size, -1), np.full(size, -1)
    to[flow.sources[away]] = where[flow.targets[away]]
    back[flow.targets[away]] = where[flow.sources[away]]
    ranks = np.flatnonzero((to >= 0) | (back >= 0))
    routes = (to[ranks] + 1) * (num_nodes + 1) + back[ranks] + 1
    low, high = np.full(num_nodes, routes.max()), np.full(num_nodes, -1)
    np.minimum.at(low, where[ranks], routes)
    np.maximum.at(high, where[ranks], routes)
    return low < high


def flows_of(kind: str, algorithm: str, nodes: Sequence[int]) -> list[Flow] | None:
    """Return the steps of a collective in their order; None where nodes of different sizes make it irregular."""
    size, members = len(nodes), _members(nodes)
    several = members is None or 1 < len(members) < size
    if kind == "allreduce":
        if algorithm == "hierarchical":
            return None if members is None else _hierarchical_allreduce(members)
        if algorithm == "halving-doubling":
            return list(_halving_doubling(size))
        if algorithm == "butterfly":
            return list(_butterfly(size))
        gather = _ring(size)
        return adjoint(gather) + gather
    if algorithm == "ring":
        gather = _ring(size)
    elif algorithm == "pairwise":
        ranks = np.arange(size)
        gather = [Flow(ranks, (ranks + distance) % size, 1, size) for distance in range(1, size)]
    elif algorithm == "hierarchical" and several:
        if members is None or not (members == np.arange(size).reshape(members.shape)).all():
            return None
        gather = _hierarchical_allgather(members)
    else:
        gather = list(_gather(np.arange(size)[None], 1, size, contiguous=True))
    return adjoint(gather) if kind == "reduce_scatter" else gather


def adjoint(flows: Sequence[Flow]) -> list[Flow]:
    """Return copying flows turned round, to be summed where they arrive."""
    return [flow._replace(sources=flow.targets, targets=flow.sources, summing=True) for flow in reversed(flows)]


def _members(nodes: Sequence[int]) -> np.ndarray | None:
    """Return the ranks of every node, (M, s), or None if nodes have different numbers of them."""
    groups: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        groups.setdefault(node, []).append(rank)
    even = len({len(ranks) for ranks in groups.values()}) == 1
    return np.array(list(groups.values())) if even else None


def _ring(size: int) -> list[Flow]:
    ranks = np.arange(size)
    return [Flow(ranks, (ranks + 1) % size, 1, size, repeat=size - 1)] if size > 1 else []


def _folded(size: int) -> tuple[int, Ranks, Ranks, Ranks]:
    """Return the power of two, who takes part, and of the folded pairs those that step aside and those that do not."""
    power = 1 << (size.bit_length() - 1)
    pairs = size - power
    aside, kept = 2 * np.arange(pairs), 2 * np.arange(pairs) + 1
    return power, np.concatenate([kept, np.arange(2 * pairs, size)]), aside, kept


def _butterfly(size: int) -> Iterator[Flow]:
    power, ranks, aside, kept = _folded(size)
    if aside.size:
        yield Flow(aside, kept, summing=True)
    distance = 1
    while distance < power:
        yield Flow(ranks, ranks[np.arange(power) ^ distance], summing=True)
        distance *= 2
    if aside.size:
        yield Flow(kept, aside)


def _halving_doubling(size: int) -> Iterator[Flow]:
    _, ranks, aside, kept = _folded(size)
    if aside.size:
        yield Flow(np.concatenate([aside, kept]), np.concatenate([kept, aside]), 1, 2, summing=True)
        yield Flow(aside, kept, 1, 2)
    gather = list(_halves(ranks[None], 1))
    yield from adjoint(gather)
    yield from gather
    if aside.size:
        yield Flow(kept, aside)


def _halves(groups: np.ndarray, of: int) -> Iterator[Flow]:
    """Yield the gathering of nested halves in every row of `groups`, a power of two long, of one of `of` blocks."""
    numbers = np.arange(groups.shape[1])
    distance = groups.shape[1] // 2
    while distance:
        yield Flow(groups.ravel(), groups[:, numbers ^ distance].ravel(), 1, of * 2 * distance)
        distance //= 2


def _gather(groups: np.ndarray, parts: int, of: int, *, contiguous: bool, pieces: int = 1) -> Iterator[Flow]:
    """Yield the gathering of blocks in every row of `groups`, each a run of `parts` of `of`.

    A power of two doubles, others go by Bruck's algorithm. Runs of blocks are one piece where these are `contiguous`
    and do not wrap.
    """
    size = groups.shape[1]
    aligned = size & (size - 1) == 0
    numbers, distance = np.arange(size), 1
    while distance < size:
        length = distance if aligned else min(distance, size - distance)
        targets = groups[:, numbers ^ distance if aligned else (numbers - distance) % size]
        wraps = not aligned and length > 1
        messages = (pieces + wraps * _extra(pieces)) if contiguous else pieces * length
        yield Flow(groups.ravel(), targets.ravel(), parts * length, of, messages=messages)
        distance *= 2


def _extra(pieces: int) -> int:
    """Return by how many a wrapped run has more pieces: each stretch of nodes before and behind the own has one."""
    return min(2, pieces)


def _hierarchical_allreduce(members: np.ndarray) -> list[Flow]:
    num_nodes, lanes = members.shape
    if lanes & (lanes - 1):
        inside = list(_gather(members, 1, lanes, contiguous=True))
    else:
        inside = list(_halves(members, 1))
    if num_nodes & (num_nodes - 1):
        ring = Flow(members.ravel(), np.roll(members, -1, axis=0).ravel(), 1, lanes * num_nodes, repeat=num_nodes - 1)
        gather = [ring]
    else:
        gather = list(_halves(members.T, lanes))
    return adjoint(inside) + adjoint(gather) + gather + inside


def _hierarchical_allgather(members: np.ndarray) -> list[Flow]:
    num_nodes, lanes = members.shape
    size = members.size
    inside = _gather(members, 1, size, contiguous=True)
    across = _gather(members.T, 1, size, contiguous=lanes == 1)
    spread = _gather(members, num_nodes - 1, size, contiguous=True, pieces=num_nodes - 1)
    return [*inside, *across, *spread]
