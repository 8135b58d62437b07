"""What a schedule is made of, and how steps are turned round and carried over to other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

Combine: TypeAlias = Literal["copy", "sum"]


class Transfer(NamedTuple):
    """One message: elements [start, stop) to or from rank `peer`.

    Both sides name the same place, unless the schedule is `local`: then each side names the place in its own array.
    """

    peer: int
    start: int
    stop: int


class Addition(NamedTuple):
    """Elements [start, stop) of a rank's array get those from `source` on added; the two ranges are disjoint."""

    start: int
    stop: int
    source: int


class Step(NamedTuple):
    """Messages in flight together. Sends read the values from before the step; receives are combined after.

    When all messages have left and arrived, the additions are made, one after the other.
    """

    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    combine: Combine = "copy"
    additions: tuple[Addition, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """What one rank does in a collective on `count` elements.

    All ranks of a collective have equally many steps, idle ones included; a message is sent and received in the same
    step. Empty messages do not exist.
    """

    steps: tuple[Step, ...]
    count: int
    local: bool = False
    """Whether places and `count` are those of this rank's own array, which may differ in length from rank to rank."""

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
        received = sum(r.stop - r.start for step in self.steps if step.combine == "sum" for r in step.receives)
        return received + sum(stop - start for step in self.steps for start, stop, _ in step.additions)


def messages(combine: Combine, sends: Sequence[Transfer] = (), receives: Sequence[Transfer] = ()) -> Step:
    """Return a step without the empty messages; both sides drop the same ones, for their ranges are equally long."""
    return Step(
        tuple([t for t in sends if t.start < t.stop]), tuple([t for t in receives if t.start < t.stop]), combine
    )


def adjoint(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return copying steps as their transpose: last first, messages turned round, and summed where they arrive.

    The copying steps must bring every element to a rank at most once, and never to its owner: nothing is zeroed.
    """
    return tuple([Step(step.receives, step.sends, "sum") for step in reversed(steps)])


def mapped(steps: Iterable[Step], ranks: Sequence[int], offset: int = 0) -> tuple[Step, ...]:
    """Return steps written for ranks 0, 1, ... as steps of `ranks`, on elements that begin at `offset`."""

    def move(transfers: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
        return tuple([Transfer(ranks[peer], start + offset, stop + offset) for peer, start, stop in transfers])

    return tuple([Step(move(step.sends), move(step.receives), step.combine) for step in steps])


def watched(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return the steps of a rank that only lets others do theirs."""
    return tuple([Step(combine=step.combine) for step in steps])


def padded(steps: Sequence[Step], length: int) -> tuple[Step, ...]:
    """Return copying steps, made up to `length` by idle ones."""
    return (*steps, *[Step()] * (length - len(steps)))
