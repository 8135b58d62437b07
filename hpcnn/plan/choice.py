"""The algorithm of a collective that is left to choose: the cheapest by the price of its schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf

from hpcnn.plan import pricing, schedules
from hpcnn.plan.machine import DEFAULT, Machine
from hpcnn.plan.schedules import Schedule

SIGNIFICANT_BITS = 5
"""Lengths are rounded to so many binary digits before they are priced: within 3 %, few prices serve all lengths."""


def allreduce_algorithm(
    num_bytes: int,
    size: int,
    machine: Machine | None = None,
    nodes: Sequence[int] | None = None,
    *,
    itemsize: int = 4,
    wire_bytes: int | None = None,
) -> str:
    """Return the cheapest algorithm of ours for an all-reduce of `num_bytes` over `size` ranks.

    Equal arguments give equal answers on all ranks. Of algorithms at the same price the one with fewer messages is
    taken.

    Parameters
    ----------
    num_bytes : int
        Size of the array.
    size : int
        Number of ranks.
    machine : Machine, optional
        What messages cost; default: the built-in machine.
    nodes : sequence of int, optional
        The node of every rank; default: each has its own.
    itemsize, wire_bytes : int
        Bytes of an element in the array and in messages.
    """
    where = tuple(range(size)) if nodes is None else tuple(nodes)
    return _allreduce(_rounded(num_bytes // itemsize), machine or DEFAULT, where, itemsize, wire_bytes)


def block_algorithm(
    num_bytes: int,
    size: int,
    machine: Machine | None = None,
    nodes: Sequence[int] | None = None,
    *,
    kind: str = "allgather",
    itemsize: int = 4,
    wire_bytes: int | None = None,
) -> str:
    """Return the cheapest algorithm for an "allgather" or "reduce_scatter" of `num_bytes` in all.

    The blocks are taken to be even. Parameters are those of `allreduce_algorithm`.
    """
    where = tuple(range(size)) if nodes is None else tuple(nodes)
    return _blocks(kind, _rounded(num_bytes // itemsize), machine or DEFAULT, where, itemsize, wire_bytes)


@lru_cache(maxsize=4096)
def _allreduce(count: int, machine: Machine, nodes: tuple[int, ...], itemsize: int, wire_bytes: int | None) -> str:
    def seconds(algorithm: str, limit_s: float) -> float:
        if algorithm == "ring" and 2 * _least(machine, len(nodes)) > limit_s:
            return inf
        return pricing.allreduce_seconds(algorithm, count, machine, nodes, itemsize, wire_bytes, limit_s)

    def schedule(algorithm: str) -> Schedule:
        return schedules.allreduce(algorithm, 0, len(nodes), count, nodes=nodes)

    return _cheapest(allreduce_algorithms(nodes), seconds, schedule)


@lru_cache(maxsize=4096)
def _blocks(
    kind: str, count: int, machine: Machine, nodes: tuple[int, ...], itemsize: int, wire_bytes: int | None
) -> str:
    def seconds(algorithm: str, limit_s: float) -> float:
        if algorithm in ("ring", "pairwise") and _least(machine, len(nodes)) > limit_s:
            return inf
        return pricing.blocks_seconds(kind, algorithm, count, machine, nodes, itemsize, wire_bytes, limit_s)

    def schedule(algorithm: str) -> Schedule:
        return schedules.allgather(algorithm, 0, len(nodes), count, nodes=nodes)

    return _cheapest(_applying(schedules.BLOCK_ALGORITHMS, nodes), seconds, schedule)


def allreduce_algorithms(nodes: Sequence[int]) -> tuple[str, ...]:
    """Return the all-reduces that these nodes call for.

    "hierarchical" is one of them where several nodes have several ranks, and on a single node where their number is no
    power of two: there it is the one that folds nothing and still needs few messages.
    """
    num_nodes, size = len(set(nodes)), len(nodes)
    flat = num_nodes == 1 and size & (size - 1) != 0
    return schedules.ALLREDUCE_ALGORITHMS if flat else _applying(schedules.ALLREDUCE_ALGORITHMS, nodes)


def _applying(algorithms: Sequence[str], nodes: Sequence[int]) -> tuple[str, ...]:
    several = 1 < len(set(nodes)) < len(nodes)
    return tuple(name for name in algorithms if several or name != "hierarchical")


def _cheapest(
    algorithms: Sequence[str], seconds: Callable[[str, float], float], schedule: Callable[[str], Schedule]
) -> str:
    """Return the algorithm of the lowest price, then of the fewest messages of rank 0, then the first."""
    best, best_s = algorithms[0], inf
    for algorithm in algorithms:
        price_s = seconds(algorithm, best_s)
        fewer = price_s == best_s and schedule(algorithm).num_messages < schedule(best).num_messages
        if price_s < best_s or fewer:
            best, best_s = algorithm, price_s
    return best


def _least(machine: Machine, size: int) -> float:
    """Return what size - 1 messages one after the other cost at least; spares thousands of steps on many ranks."""
    return (size - 1) * min(machine.link(same_node=same).seconds(1) for same in (False, True))


def _rounded(count: int) -> int:
    """Return the nearest number with `SIGNIFICANT_BITS` binary digits and zeros after them."""
    shift = max(0, count.bit_length() - SIGNIFICANT_BITS)
    return (count + (1 << shift >> 1)) >> shift << shift
