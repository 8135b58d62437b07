"""Collectives as data: who sends which index range to whom, in which step.

One description serves the engine that runs it over MPI, the simulator that prices it, the tests that interpret it in
memory and `hpcnn plan`, which counts its messages. Nothing here knows MPI or arrays.

With p ranks, q = 2^k the largest power of two not above p, f = p - q ranks folded away, n elements:

=================  ==========================================  ===========================================
all-reduce         messages sent by a rank                     elements sent by a rank (q dividing n)
=================  ==========================================  ===========================================
butterfly          k  (pair: 1 folded, k + 1 staying)          n k  (pair: n folded, n (k + 1) staying)
halving-doubling   2k (pair: 2 folded, 2k + 2 staying)         2n (q-1)/q  (pair: n folded, + 3n/2 staying)
ring               2 (p-1)                                     2 (p-1) blocks, about 2n (p-1)/p
=================  ==========================================  ===========================================

Folding: of the first 2f ranks each even one hands its data to its odd neighbour, which takes part for both and returns
the result. So a staying rank is busy in k + 2 (butterfly) or 2k + 3 (halving-doubling) steps.

Butterfly and halving-doubling add every element in one and the same binary tree, ascending distances 1, 2, 4, ... over
the ranks that take part: ((0+1)+(2+3))+... for a power of two. They give the same bits as each other on all ranks. The
ring adds block i in the order i-1, i-2, ..., i, which differs by block but again not by rank.

References
----------
Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19(1), 2005.
Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing systems",
IEEE TPDS 8(11), 1997.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

from hpcnn import geometry
from hpcnn.errors import PlanError
from hpcnn.geometry import Block

Combine: TypeAlias = Literal["copy", "sum"]

ALLREDUCE_ALGORITHMS = ("butterfly", "halving-doubling", "ring")
BLOCK_ALGORITHMS = ("butterfly", "ring")


class Transfer(NamedTuple):
    """One message: elements [start, stop) to or from rank `peer`, at the same place on both sides."""

    peer: int
    start: int
    stop: int


class Step(NamedTuple):
    """Messages in flight together. Sends read the values from before the step; receives are combined after."""

    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    combine: Combine = "copy"


@dataclass(frozen=True)
class Schedule:
    """What one rank does in a collective on `count` elements.

    All ranks of a collective have equally many steps, idle ones included; a message is sent and received in the same
    step. Empty messages do not exist.
    """

    steps: tuple[Step, ...]
    count: int

    @cached_property
    def num_messages(self) -> int:
        """Messages this rank sends."""
        return sum(len(step.sends) for step in self.steps)

    @cached_property
    def num_elements_sent(self) -> int:
        """Elements this rank sends."""
        return sum(send.stop - send.start for step in self.steps for send in step.sends)

    @cached_property
    def num_additions(self) -> int:
        """Elements this rank adds to its own."""
        return sum(r.stop - r.start for step in self.steps if step.combine == "sum" for r in step.receives)


def allreduce(algorithm: str, rank: int, size: int, count: int) -> Schedule:
    """Return the schedule after which every rank holds the sum of all ranks' `count` elements.

    Raises
    ------
    PlanError
        If the algorithm is unknown or a number is out of range.
    """
    _check(rank, size, count)
    if algorithm not in ALLREDUCE_ALGORITHMS:
        raise _unknown("allreduce", algorithm, ALLREDUCE_ALGORITHMS)
    if size == 1 or count == 0:
        return Schedule((), count)
    if algorithm == "ring":
        gather = tuple(_ring(rank, size, _boundaries(size, count, None)))
        return Schedule(_adjoint(gather) + gather, count)
    steps = _butterfly if algorithm == "butterfly" else _halving_doubling
    return Schedule(tuple(steps(rank, size, count)), count)


def allgather(algorithm: str, rank: int, size: int, count: int, boundaries: Sequence[int] | None = None) -> Schedule:
    """Return the schedule after which every rank holds all blocks, having started with its own.

    "butterfly" is recursive doubling on a power of two, k = lg p messages. On other sizes it is Bruck's algorithm in
    ceil(lg p) steps, where a range that wraps past the last rank is two messages. Either way, and round the ring in
    p - 1 messages, a rank receives every element but its own once.

    Parameters
    ----------
    algorithm : str
        "butterfly" or "ring".
    rank, size, count : int
        This rank, the number of ranks, and the number of elements in all blocks together.
    boundaries : sequence of int, optional
        size + 1 ascending numbers from 0 to count: rank i owns [boundaries[i], boundaries[i + 1]).
        Default: the blocks of `geometry.split`.

    Raises
    ------
    PlanError
        If the algorithm is unknown, a number is out of range, or the boundaries are not as above.
    """
    _check(rank, size, count)
    if algorithm not in BLOCK_ALGORITHMS:
        raise _unknown("allgather", algorithm, BLOCK_ALGORITHMS)
    bounds = _boundaries(size, count, boundaries)
    if size == 1 or count == 0:
        return Schedule((), count)
    if algorithm == "ring":
        return Schedule(tuple(_ring(rank, size, bounds)), count)
    steps = _bruck if size & (size - 1) else _doubling
    return Schedule(tuple(steps(rank, size, bounds)), count)


def reduce_scatter(
    algorithm: str, rank: int, size: int, count: int, boundaries: Sequence[int] | None = None
) -> Schedule:
    """Return the schedule after which rank i holds the sum over all ranks of block i, the rest being scratch.

    It is the adjoint of `allgather`: the same messages backwards, summed. On a power of two "butterfly" is thereby
    recursive halving, distances p/2, ..., 2, 1: one tree for all elements, but not the one of the all-reduce.
    Parameters and errors are those of `allgather`.
    """
    gather = allgather(algorithm, rank, size, count, boundaries)
    return Schedule(_adjoint(gather.steps), count)


def validate(schedules: Sequence[Schedule]) -> None:
    """Check the schedules of all ranks against each other.

    Raises
    ------
    PlanError
        If a send has no equal receive in the same step of its peer, ranks disagree on the steps, or a rank would
        overwrite elements that it sends or receives in the same step.
    """
    shapes = {(len(s.steps), s.count, tuple(step.combine for step in s.steps)) for s in schedules}
    if len(shapes) != 1:
        raise PlanError("schedule: ranks differ in number of steps, elements or in how they combine; all must agree.")
    for index in range(len(schedules[0].steps)):
        sent: dict[tuple[int, int], list[tuple[int, int]]] = {}
        received: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for rank, schedule in enumerate(schedules):
            step = schedule.steps[index]
            _validate_step(f"schedule: step {index} of rank {rank}", step, schedule.count)
            for peer, start, stop in step.sends:
                sent.setdefault((rank, peer), []).append((start, stop))
            for peer, start, stop in step.receives:
                received.setdefault((peer, rank), []).append((start, stop))
        for source, target in sorted(sent.keys() | received.keys()):
            away, home = sent.get((source, target), []), received.get((source, target), [])
            if away != home:
                raise PlanError(
                    f"schedule: in step {index} rank {source} sends {away} to rank {target}, which receives {home};"
                    " both must be equal and in the same order."
                )


def _validate_step(who: str, step: Step, count: int) -> None:
    for transfer in step.sends + step.receives:
        if not 0 <= transfer.start < transfer.stop <= count:
            raise PlanError(f"{who}: {transfer} is empty or outside [0, {count}).")
    for index, (_, start, stop) in enumerate(step.receives):
        others = step.receives[:index] + (step.sends if step.combine == "copy" else ())
        if any(other.start < stop and start < other.stop for other in others):
            raise PlanError(f"{who}: elements [{start}, {stop}) are received and in use by another message.")


def _check(rank: int, size: int, count: int) -> None:
    if not 0 <= rank < size:
        raise PlanError(f"schedule: rank (={rank}) must be at least 0 and below size (={size}).")
    if count < 0:
        raise PlanError(f"schedule: count (={count}) must not be negative.")


def _unknown(who: str, algorithm: str, known: Sequence[str]) -> PlanError:
    return PlanError(f"{who}: unknown algorithm '{algorithm}'; it must be one of {', '.join(known)}.")


def _boundaries(size: int, count: int, boundaries: Sequence[int] | None) -> Sequence[int]:
    if boundaries is None:
        return [geometry.split(count, size, index).start for index in range(size)] + [count]
    pairs = pairwise(boundaries)
    if len(boundaries) != size + 1 or boundaries[0] != 0 or boundaries[-1] != count or any(a > b for a, b in pairs):
        raise PlanError(
            f"schedule: boundaries (={list(boundaries)}) must be {size + 1} ascending numbers from 0 to"
            f" count (={count})."
        )
    return boundaries


def _step(combine: Combine, sends: Sequence[Transfer] = (), receives: Sequence[Transfer] = ()) -> Step:
    """Return a step without the empty messages; both sides drop the same ones, for their ranges are equal."""
    return Step(
        tuple([t for t in sends if t.start < t.stop]), tuple([t for t in receives if t.start < t.stop]), combine
    )


def _adjoint(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return copying steps as their transpose: last first, messages turned round, and summed where they arrive."""
    return tuple([Step(step.receives, step.sends, "sum") for step in reversed(steps)])


class _Fold(NamedTuple):
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


def _fold(rank: int, size: int) -> _Fold:
    power = 1 << (size.bit_length() - 1)
    pairs = size - power
    if rank >= 2 * pairs:
        return _Fold(power, pairs, None, rank - pairs)
    return _Fold(power, pairs, rank ^ 1, rank // 2 if rank % 2 else None)


def _butterfly(rank: int, size: int, count: int) -> Iterator[Step]:
    """Recursive doubling: whole vectors, distances 1, 2, 4, ..., between one folding and one unfolding step."""
    fold = _fold(rank, size)
    everything = None if fold.partner is None else Transfer(fold.partner, 0, count)
    if fold.num_pairs:
        yield _one_way("sum", everything, sending=fold.number is None)
    distance = 1
    while distance < fold.size:
        both = () if fold.number is None else (Transfer(fold.rank(fold.number ^ distance), 0, count),)
        yield Step(both, both, "sum")
        distance *= 2
    if fold.num_pairs:
        yield _one_way("copy", everything, sending=fold.number is not None)


def _halving_doubling(rank: int, size: int, count: int) -> Iterator[Step]:
    """Rabenseifner's algorithm with ascending distances, pairs being folded by halves.

    Each partner adds one half of the pair's vectors, then the folded one hands its half over.
    """
    fold = _fold(rank, size)
    middle = geometry.split(count, 2, 0).stop
    if fold.num_pairs:
        if fold.partner is None:
            yield from (Step(combine="sum"), Step())
        else:
            low, high = Transfer(fold.partner, 0, middle), Transfer(fold.partner, middle, count)
            away, kept = (high, low) if fold.number is None else (low, high)
            yield _step("sum", [away], [kept])
            yield _one_way("copy", low, sending=fold.number is None)
    gather = _halves(fold, count)
    yield from _adjoint(gather)
    yield from gather
    if fold.num_pairs:
        everything = None if fold.partner is None else Transfer(fold.partner, 0, count)
        yield _one_way("copy", everything, sending=fold.number is not None)


def _halves(fold: _Fold, count: int) -> tuple[Step, ...]:
    """Return the steps that gather the whole from nested halves; bit i of the number chooses at distance 2^i."""
    steps = []
    block = Block(0, count)
    distance = 1
    while distance < fold.size:
        if fold.number is None:
            steps.append(Step())
        else:
            middle = block.start + geometry.split(block.size, 2, 0).stop
            low, high = Block(block.start, middle), Block(middle, block.stop)
            mine, other = (high, low) if fold.number & distance else (low, high)
            peer = fold.rank(fold.number ^ distance)
            steps.append(_step("copy", [Transfer(peer, *mine)], [Transfer(peer, *other)]))
            block = mine
        distance *= 2
    return tuple(reversed(steps))


def _one_way(combine: Combine, transfer: Transfer | None, *, sending: bool) -> Step:
    """Return the step of a rank that sends, receives, or (transfer None) watches."""
    if transfer is None:
        return Step(combine=combine)
    return _step(combine, [transfer], []) if sending else _step(combine, [], [transfer])


def _ring(rank: int, size: int, bounds: Sequence[int]) -> Iterator[Step]:
    """All-gather round the ring: pass on to the right what came from the left, starting with the own block."""
    right, left = (rank + 1) % size, (rank - 1) % size
    for hop in range(size - 1):
        away, new = (rank - hop) % size, (rank - hop - 1) % size
        yield _step(
            "copy",
            [Transfer(right, bounds[away], bounds[away + 1])],
            [Transfer(left, bounds[new], bounds[new + 1])],
        )


def _doubling(rank: int, size: int, bounds: Sequence[int]) -> Iterator[Step]:
    """All-gather by recursive doubling, for a power of two: swap the aligned runs of 1, 2, 4, ... blocks."""
    distance = 1
    while distance < size:
        peer = rank ^ distance
        mine, other = rank & -distance, peer & -distance
        yield _step(
            "copy",
            [Transfer(peer, bounds[mine], bounds[mine + distance])],
            [Transfer(peer, bounds[other], bounds[other + distance])],
        )
        distance *= 2


def _bruck(rank: int, size: int, bounds: Sequence[int]) -> Iterator[Step]:
    """All-gather for any size: the run of blocks from the own one upwards grows by 1, 2, 4, ... and wraps round."""
    distance = 1
    while distance < size:
        blocks = min(distance, size - distance)
        source = (rank + distance) % size
        yield _step(
            "copy",
            _run((rank - distance) % size, rank, blocks, size, bounds),
            _run(source, source, blocks, size, bounds),
        )
        distance *= 2


def _run(peer: int, first: int, blocks: int, size: int, bounds: Sequence[int]) -> list[Transfer]:
    """Return the messages that carry `blocks` blocks from number `first` on, wrapping past the last."""
    wrapped = max(0, first + blocks - size)
    return [Transfer(peer, bounds[first], bounds[first + blocks - wrapped]), Transfer(peer, bounds[0], bounds[wrapped])]
