"""All-to-all and gather: each message goes straight from where it is made to where it is wanted."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from hpcnn.errors import PlanError
from hpcnn.plan import schedules
from hpcnn.plan.schedules import Schedule, Step, Transfer
from tests.in_memory import interpret


def matrices(size: int) -> list[list[list[int]]]:
    """Return counts: uneven with zeros, even, none but one, and one rank that only receives."""
    generator = np.random.default_rng(size)
    uneven = generator.integers(0, 4, (size, size)) * generator.integers(0, 2, (size, size))
    one = np.zeros((size, size), int)
    one[-1, 0] = 5
    receiver = np.zeros((size, size), int)
    receiver[:, size // 2] = np.arange(size)
    return [m.tolist() for m in (uneven, np.full((size, size), 3), one, receiver)]


def value(source: int, target: int, count: int) -> np.ndarray:
    return 1_000_000.0 * source + 1000 * target + np.arange(count)


@pytest.mark.parametrize("size", range(1, 34))
def test_alltoall_brings_to_every_rank_what_each_other_has_for_it(size):
    for counts in matrices(size):
        ranks = [schedules.alltoall("pairwise", rank, size, counts) for rank in range(size)]
        schedules.validate(ranks)
        arrays = []
        for rank, schedule in enumerate(ranks):
            arrays.append(np.full(schedule.count, np.nan))
            sent = sum(counts[rank])
            arrays[-1][:sent] = np.concatenate([value(rank, j, counts[rank][j]) for j in range(size)])
        for rank, result in enumerate(interpret(ranks, arrays)):
            away, home = schedules.alltoall_places(rank, counts)
            result[home[rank] : home[rank + 1]] = result[away[rank] : away[rank + 1]]
            sent = sum(counts[rank])
            np.testing.assert_array_equal(arrays[rank][:sent], result[:sent])
            expected = np.concatenate([value(j, rank, counts[j][rank]) for j in range(size)])
            np.testing.assert_array_equal(expected, result[sent:])


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13])
def test_alltoall_sends_the_row_without_its_own_block_in_p_minus_1_messages(size):
    counts = [[1 + (3 * i + j) % 4 for j in range(size)] for i in range(size)]
    for rank in range(size):
        schedule = schedules.alltoall("pairwise", rank, size, counts)
        assert size - 1 == schedule.num_messages == len(schedule.steps)
        assert sum(counts[rank]) - counts[rank][rank] == schedule.num_elements_sent
        assert 0 == schedule.num_additions
        assert schedule.local


def test_alltoall_does_not_send_what_is_empty():
    counts = [[4, 0, 2], [0, 1, 0], [3, 0, 0]]
    ranks = [schedules.alltoall("pairwise", rank, 3, counts) for rank in range(3)]
    assert [1, 0, 1] == [schedule.num_messages for schedule in ranks]
    assert [2, 2, 2] == [len(schedule.steps) for schedule in ranks]


def test_alltoall_places_put_what_is_sent_before_what_is_received():
    assert ((0, 4, 4, 6), (6, 10, 10, 13)) == schedules.alltoall_places(0, [[4, 0, 2], [0, 1, 0], [3, 0, 0]])
    assert ((0, 3, 3, 3), (3, 5, 5, 5)) == schedules.alltoall_places(2, np.array([[4, 0, 2], [0, 1, 0], [3, 0, 0]]))
    assert all(type(n) is int for n in schedules.alltoall_places(0, np.ones((2, 2), np.int32))[1])


def test_impossible_counts_are_refused():
    with pytest.raises(PlanError, match="unknown algorithm 'ring'; it must be one of pairwise"):
        schedules.alltoall("ring", 0, 1, [[0]])
    with pytest.raises(PlanError, match=r"counts \(=2 rows\) must have a row for each of 3 ranks"):
        schedules.alltoall("pairwise", 0, 3, [[0, 0, 0], [0, 0, 0]])
    with pytest.raises(PlanError, match="square matrix"):
        schedules.alltoall("pairwise", 0, 2, [[0, 0], [0]])
    for counts in ([[0, -1], [0, 0]], [[0, 0], [-1, 0]]):
        with pytest.raises(PlanError, match="must not be negative"):
            schedules.alltoall("pairwise", 0, 2, counts)
    with pytest.raises(PlanError, match=r"rank \(=2\)"):
        schedules.alltoall("pairwise", 2, 2, [[0, 0], [0, 0]])


@pytest.mark.parametrize("size", range(1, 34))
def test_gather_brings_every_block_to_the_root_and_changes_nobody_else(size):
    generator = np.random.default_rng(size)
    for root in {0, size // 2, size - 1}:
        cuts = sorted(generator.integers(0, 41, size - 1).tolist())
        bounds = (0, *cuts, 40)
        ranks = [schedules.gather(rank, size, root, bounds) for rank in range(size)]
        schedules.validate(ranks)
        index = np.arange(40)
        starts = [
            np.where((a <= index) & (index < b), index, -1 - rank) for rank, (a, b) in enumerate(pairwise(bounds))
        ]
        for rank, result in enumerate(interpret(ranks, starts)):
            np.testing.assert_array_equal(index if rank == root else starts[rank], result)
        for rank, ((a, b), schedule) in enumerate(zip(pairwise(bounds), ranks, strict=True)):
            assert (0 if rank == root else b - a) == schedule.num_elements_sent
            assert int(rank != root and a < b) == schedule.num_messages


def test_a_gather_of_nothing_or_on_one_rank_has_no_steps():
    assert () == schedules.gather(0, 1, 0, (0, 9)).steps
    assert () == schedules.gather(1, 3, 0, (0, 0, 0, 0)).steps


def test_impossible_gathers_are_refused():
    with pytest.raises(PlanError, match=r"root \(=2\) must be at least 0 and below size \(=2\)"):
        schedules.gather(0, 2, 2, (0, 1, 2))
    for bounds in ((), (0, 2), (0, 3, 2), (1, 2, 3)):
        with pytest.raises(PlanError, match="3 ascending numbers from 0 to"):
            schedules.gather(0, 2, 0, bounds)


# -- schedules whose places are each rank's own ------------------------------------------------------------------------


def pair(send: Transfer, receive: Transfer, *, local: bool = True) -> list[Schedule]:
    """Return a message from rank 0, with 4 elements, to rank 1, with 6."""
    counts = (4, 6) if local else (6, 6)
    return [
        Schedule((Step((send,), ()),), counts[0], local=local),
        Schedule((Step((), (receive,)),), counts[1], local=local),
    ]


def test_validate_compares_the_lengths_of_local_places():
    schedules.validate(pair(Transfer(1, 0, 3), Transfer(0, 3, 6)))
    with pytest.raises(PlanError, match="equally long"):
        schedules.validate(pair(Transfer(1, 0, 3), Transfer(0, 3, 5)))
    with pytest.raises(PlanError, match="must be equal and in"):
        schedules.validate(pair(Transfer(1, 0, 3), Transfer(0, 3, 6), local=False))
    with pytest.raises(PlanError, match="equally long"):
        schedules.validate([pair(Transfer(1, 0, 3), Transfer(0, 3, 6))[0], Schedule((Step(),), 6, local=True)])
    both = [
        Schedule((Step((Transfer(1, 0, 1), Transfer(1, 1, 3))),), 3, local=True),
        Schedule((Step((), (Transfer(0, 0, 2), Transfer(0, 2, 3))),), 3, local=True),
    ]
    with pytest.raises(PlanError, match="in the same order"):
        schedules.validate(both)


def test_validate_holds_local_places_against_the_ranks_own_length():
    with pytest.raises(PlanError, match=r"rank 0: .* outside \[0, 4\)"):
        schedules.validate(pair(Transfer(1, 2, 5), Transfer(0, 2, 5)))
    with pytest.raises(PlanError, match=r"rank 1: .* outside \[0, 6\)"):
        schedules.validate(pair(Transfer(1, 0, 3), Transfer(0, 4, 7)))
    swap = [Schedule((Step((Transfer(1 - r, 0, 2),), (Transfer(1 - r, 1, 3),)),), 4 + r, local=True) for r in range(2)]
    with pytest.raises(PlanError, match=r"\[1, 3\) are received and in use"):
        schedules.validate(swap)


def test_validate_refuses_local_and_common_places_side_by_side():
    first, second = pair(Transfer(1, 0, 3), Transfer(0, 0, 3))
    with pytest.raises(PlanError, match="all must agree"):
        schedules.validate([first, Schedule(second.steps, 4)])
    with pytest.raises(PlanError, match="all must agree"):
        schedules.validate([Schedule(first.steps, 6), second])
