"""What is refused: numbers that describe no collective, and schedules of several ranks that do not fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

from hpcnn import geometry
from hpcnn.errors import PlanError
from hpcnn.plan.schedules.schedule import Schedule, Step

_Places: TypeAlias = dict[tuple[int, int], list[tuple[int, int]]]


def validate(schedules: Sequence[Schedule]) -> None:
    """Check the schedules of all ranks against each other.

    Raises
    ------
    PlanError
        If a send has no equal receive in the same step of its peer (in local schedules: none of equal length), ranks
        disagree on the steps, or a rank would overwrite elements that it sends or receives in the same step.
    """
    shapes = {(len(s.steps), None if s.local else s.count, tuple(step.combine for step in s.steps)) for s in schedules}
    if len(shapes) != 1:
        raise PlanError("schedule: ranks differ in number of steps, elements or in how they combine; all must agree.")
    local = schedules[0].local
    for index in range(len(schedules[0].steps)):
        sent: _Places = {}
        received: _Places = {}
        for rank, schedule in enumerate(schedules):
            step = schedule.steps[index]
            _validate_step(f"schedule: step {index} of rank {rank}", step, schedule.count)
            for peer, start, stop in step.sends:
                sent.setdefault((rank, peer), []).append((start, stop))
            for peer, start, stop in step.receives:
                received.setdefault((peer, rank), []).append((start, stop))
        for source, target in sorted(sent.keys() | received.keys()):
            away, home = sent.get((source, target), []), received.get((source, target), [])
            if (_lengths(away) != _lengths(home)) if local else (away != home):
                raise PlanError(
                    f"schedule: in step {index} rank {source} sends {away} to rank {target}, which receives {home};"
                    f" both must be equal{'ly long' if local else ''} and in the same order."
                )


def _lengths(places: Sequence[tuple[int, int]]) -> list[int]:
    return [stop - start for start, stop in places]


def _validate_step(who: str, step: Step, count: int) -> None:
    for transfer in step.sends + step.receives:
        if not 0 <= transfer.start < transfer.stop <= count:
            raise PlanError(f"{who}: {transfer} is empty or outside [0, {count}).")
    for index, (_, start, stop) in enumerate(step.receives):
        others = step.receives[:index] + (step.sends if step.combine == "copy" else ())
        if any(other.start < stop and start < other.stop for other in others):
            raise PlanError(f"{who}: elements [{start}, {stop}) are received and in use by another message.")


def check_numbers(rank: int, size: int, count: int) -> None:
    """Raise PlanError unless there is such a rank and `count` is not negative."""
    if not 0 <= rank < size:
        raise PlanError(f"schedule: rank (={rank}) must be at least 0 and below size (={size}).")
    if count < 0:
        raise PlanError(f"schedule: count (={count}) must not be negative.")


def check_algorithm(who: str, algorithm: str, known: Sequence[str]) -> None:
    """Raise PlanError unless the algorithm is known."""
    if algorithm not in known:
        raise PlanError(f"{who}: unknown algorithm '{algorithm}'; it must be one of {', '.join(known)}.")


def check_nodes(size: int, nodes: Sequence[int] | None) -> tuple[int, ...]:
    """Return the node of every rank, all ranks being on one if `nodes` is None."""
    if nodes is None:
        return (0,) * size
    if len(nodes) != size:
        raise PlanError(f"schedule: nodes (={len(nodes)} numbers) must name one node for each of {size} ranks.")
    return tuple(nodes)


def check_boundaries(size: int, count: int, boundaries: Sequence[int] | None) -> Sequence[int]:
    """Return the boundaries of every rank's block, those of `geometry.split` if None."""
    if boundaries is None:
        return _even_boundaries(size, count)
    pairs = pairwise(boundaries)
    if len(boundaries) != size + 1 or boundaries[0] != 0 or boundaries[-1] != count or any(a > b for a, b in pairs):
        raise PlanError(
            f"schedule: boundaries (={list(boundaries)}) must be {size + 1} ascending numbers from 0 to"
            f" count (={count})."
        )
    return boundaries


@lru_cache(maxsize=64)
def _even_boundaries(size: int, count: int) -> tuple[int, ...]:
    return (0, *[block.stop for block in geometry.blocks(count, size)])
