"""All-reduces in a binary tree over the ranks: recursive doubling, and halving-doubling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hpcnn import geometry
from hpcnn.geometry import Block
from hpcnn.plan.schedules.schedule import Combine, Step, Transfer, adjoint, messages


class Fold(NamedTuple):
    """Role of one rank among the power-of-two `size` ranks that take part."""

    size: int
    num_pairs: int
    partner: int | None
    """The other rank of a folded pair."""
    number: int | None
    """Number among those taking part; None for the rank that its partner stands in for."""

    def rank(self, number: int) -> int:
        """Return the rank that takes part as `number`."""
        return 2 * number + 1 if number < self.num_pairs else number + self.num_pairs


def fold(rank: int, size: int) -> Fold:
    """Return the role of a rank: of the first 2 f ranks the even ones step aside for the odd ones."""
    power = 1 << (size.bit_length() - 1)
    pairs = size - power
    if rank >= 2 * pairs:
        return Fold(power, pairs, None, rank - pairs)
    return Fold(power, pairs, rank ^ 1, rank // 2 if rank % 2 else None)


def butterfly(rank: int, size: int, count: int) -> Iterator[Step]:
    """Recursive doubling: whole vectors, distances 1, 2, 4, ..., between one folding and one unfolding step."""
    role = fold(rank, size)
    everything = None if role.partner is None else Transfer(role.partner, 0, count)
    if role.num_pairs:
        yield _one_way("sum", everything, sending=role.number is None)
    distance = 1
    while distance < role.size:
        both = () if role.number is None else (Transfer(role.rank(role.number ^ distance), 0, count),)
        yield Step(both, both, "sum")
        distance *= 2
    if role.num_pairs:
        yield _one_way("copy", everything, sending=role.number is not None)


def halving_doubling(rank: int, size: int, count: int) -> Iterator[Step]:
    """Rabenseifner's algorithm with ascending distances, pairs being folded by halves.

    Each partner adds one half of the pair's vectors, then the folded one hands its half over.
    """
    role = fold(rank, size)
    middle = geometry.split(count, 2, 0).stop
    if role.num_pairs:
        if role.partner is None:
            yield from (Step(combine="sum"), Step())
        else:
            low, high = Transfer(role.partner, 0, middle), Transfer(role.partner, middle, count)
            away, kept = (high, low) if role.number is None else (low, high)
            yield messages("sum", [away], [kept])
            yield _one_way("copy", low, sending=role.number is None)
    gather = halves(role, count)
    yield from adjoint(gather)
    yield from gather
    if role.num_pairs:
        everything = None if role.partner is None else Transfer(role.partner, 0, count)
        yield _one_way("copy", everything, sending=role.number is not None)


def halves(role: Fold, count: int) -> tuple[Step, ...]:
    """Return the steps that gather the whole from nested halves, those of `half` being the smallest."""
    steps = []
    distance = 1
    while distance < role.size:
        if role.number is None:
            steps.append(Step())
        else:
            other = role.number ^ distance
            peer = role.rank(other)
            mine, theirs = half(role.number, 2 * distance, count), half(other, 2 * distance, count)
            steps.append(messages("copy", [Transfer(peer, *mine)], [Transfer(peer, *theirs)]))
        distance *= 2
    return tuple(reversed(steps))


def half(number: int, parts: int, count: int) -> Block:
    """Return one of `parts` (a power of two) blocks of nested halves; bit i of the number chooses at distance 2^i."""
    block = Block(0, count)
    distance = 1
    while distance < parts:
        middle = block.start + geometry.split(block.size, 2, 0).stop
        block = Block(middle, block.stop) if number & distance else Block(block.start, middle)
        distance *= 2
    return block


def _one_way(combine: Combine, transfer: Transfer | None, *, sending: bool) -> Step:
    """Return the step of a rank that sends, receives, or (transfer None) watches."""
    if transfer is None:
        return Step(combine=combine)
    return messages(combine, [transfer], []) if sending else messages(combine, [], [transfer])
