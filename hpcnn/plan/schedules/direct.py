"""Collectives in which every message goes straight from where it is made to where it is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from hpcnn.errors import PlanError
from hpcnn.plan.schedules import checks
from hpcnn.plan.schedules.schedule import Schedule, Transfer, messages

ALLTOALL_ALGORITHMS = ("pairwise",)


def alltoall(algorithm: str, rank: int, size: int, counts: Sequence[Sequence[int]]) -> Schedule:
    """Return the schedule that brings to every rank what each other one has for it.

    It is `local`: it works on an array of this rank's own length, in which stand first what it sends to ranks
    0, 1, ..., p - 1 and then, in the same order, what it receives from them (see `alltoall_places`). What a rank has
    for itself has both places too, but no message: the caller copies it from the one to the other.

    Parameters
    ----------
    algorithm : str
        "pairwise": in step i to rank + i and from rank - i.
    rank, size : int
        This rank and the number of ranks.
    counts : sequence of sequences of int
        counts[i][j] elements go from rank i to rank j. All ranks must pass the same, but each reads only its own row
        and column.

    Raises
    ------
    PlanError
        If the algorithm is unknown, the rank out of range, or counts no size x size matrix of numbers from 0 on.
    """
    checks.check_numbers(rank, size, 0)
    checks.check_algorithm("alltoall", algorithm, ALLTOALL_ALGORITHMS)
    if len(counts) != size:
        raise PlanError(f"alltoall: counts (={len(counts)} rows) must have a row for each of {size} ranks.")
    away, home = alltoall_places(rank, counts)
    steps = []
    for distance in range(1, size):
        target, source = (rank + distance) % size, (rank - distance) % size
        steps.append(
            messages(
                "copy",
                [Transfer(target, away[target], away[target + 1])],
                [Transfer(source, home[source], home[source + 1])],
            )
        )
    return Schedule(tuple(steps), home[-1], local=True)


def alltoall_places(rank: int, counts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where things stand in the array that `alltoall` works on.

    Returns
    -------
    send_boundaries, receive_boundaries : tuple of int
        What goes to rank j is [send_boundaries[j], send_boundaries[j + 1]), what comes from it
        [receive_boundaries[j], receive_boundaries[j + 1]). The latter begin where the former end, and the last of them
        is the length of the array.

    Raises
    ------
    PlanError
        If counts is no square matrix of numbers from 0 on.
    """
    size = len(counts)
    if not 0 <= rank < size or any(len(row) != size for row in counts):
        raise PlanError(
            f"alltoall: counts (={size} rows of {sorted({len(row) for row in counts})}) must be a square matrix with a"
            f" row for rank (={rank})."
        )
    row, column = [int(count) for count in counts[rank]], [int(line[rank]) for line in counts]
    if min(row + column) < 0:
        raise PlanError(f"alltoall: counts of rank {rank} (sends {row}, receives {column}) must not be negative.")
    away = tuple(accumulate(row, initial=0))
    return away, tuple(accumulate(column, initial=away[-1]))


def gather(rank: int, size: int, root: int, boundaries: Sequence[int]) -> Schedule:
    """Return the schedule after which rank `root` holds all blocks: every other rank sends its own there, in one step.

    Parameters
    ----------
    rank, size, root : int
        This rank, the number of ranks, and who gathers.
    boundaries : sequence of int
        size + 1 ascending numbers from 0: rank i owns [boundaries[i], boundaries[i + 1]) of everybody's array.

    Raises
    ------
    PlanError
        If a number is out of range or the boundaries are not as above.
    """
    checks.check_numbers(rank, size, 0)
    if not 0 <= root < size:
        raise PlanError(f"gather: root (={root}) must be at least 0 and below size (={size}).")
    count = boundaries[-1] if boundaries else 0
    bounds = checks.check_boundaries(size, count, boundaries)
    if size == 1 or count == 0:
        return Schedule((), count)
    if rank != root:
        return Schedule((messages("copy", [Transfer(root, bounds[rank], bounds[rank + 1])]),), count)
    receives = [Transfer(peer, *block) for peer, block in enumerate(pairwise(bounds)) if peer != root]
    return Schedule((messages("copy", (), receives),), count)
