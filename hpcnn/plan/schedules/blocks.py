"""All-gathers: steps after which every rank has all blocks. Their adjoints are the reduce-scatters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from hpcnn.geometry import Block
from hpcnn.plan.schedules.schedule import Step, Transfer, messages

Runs: TypeAlias = Callable[[int, int], Sequence[Block]]
"""From a rank and a number of ranks, itself and those after it, wrapping past the last: where their blocks lie."""


def ring(rank: int, size: int, bounds: Sequence[int]) -> Iterator[Step]:
    """Pass on to the right what came from the left, starting with the own block."""
    right, left = (rank + 1) % size, (rank - 1) % size
    for hop in range(size - 1):
        away, new = (rank - hop) % size, (rank - hop - 1) % size
        yield messages(
            "copy",
            [Transfer(right, bounds[away], bounds[away + 1])],
            [Transfer(left, bounds[new], bounds[new + 1])],
        )


def pairwise(rank: int, size: int, bounds: Sequence[int]) -> Iterator[Step]:
    """Send the own block to each rank and receive each block from its owner, at distances 1, 2, ..., p - 1."""
    for distance in range(1, size):
        target, source = (rank + distance) % size, (rank - distance) % size
        yield messages(
            "copy",
            [Transfer(target, bounds[rank], bounds[rank + 1])],
            [Transfer(source, bounds[source], bounds[source + 1])],
        )


def butterfly(rank: int, size: int, where: Runs) -> Iterator[Step]:
    """Gather at distances 1, 2, 4, ... in ceil(lg p) steps.

    For a power of two this is recursive doubling: aligned runs of 1, 2, 4, ... blocks are swapped. Otherwise it is
    Bruck's algorithm: the run of blocks from the own one upwards grows by 1, 2, 4, ... and wraps round.
    """
    aligned = size & (size - 1) == 0
    distance = 1
    while distance < size:
        if aligned:
            target = source = rank ^ distance
            away, new, length = rank & -distance, source & -distance, distance
        else:
            target, source = (rank - distance) % size, (rank + distance) % size
            away, new, length = rank, source, min(distance, size - distance)
        yield messages(
            "copy",
            [Transfer(target, *block) for block in where(away, length)],
            [Transfer(source, *block) for block in where(new, length)],
        )
        distance *= 2


def num_butterfly_steps(size: int) -> int:
    """Return ceil(lg p)."""
    return (size - 1).bit_length()


def runs(size: int, bounds: Sequence[int]) -> Runs:
    """Return where runs of blocks lie that follow each other in the order of ranks: in one range, or two that wrap."""

    def where(first: int, length: int) -> Sequence[Block]:
        wrapped = max(0, first + length - size)
        return Block(bounds[first], bounds[first + length - wrapped]), Block(bounds[0], bounds[wrapped])

    return where
