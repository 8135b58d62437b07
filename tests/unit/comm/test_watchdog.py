"""The watchdog among ranks that share a clock and a post made of lists."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpcnn.comm.verdict import Waiting
from hpcnn.comm.watchdog import GRACE_S, Watchdog

TIMEOUT_S = 60.0


class Team:
    """Ranks with a watchdog each, in steps of a tenth of a second."""

    def __init__(self, size: int, timeout_s: float = TIMEOUT_S) -> None:
        self.now = 0.0
        self.ended: list[tuple[int, str]] = []
        self.num_told = 0
        self.boxes: list[list[tuple[int, bytes]]] = [[] for _ in range(size)]
        self.ranks = [Rank(self, rank, size, timeout_s) for rank in range(size)]

    def run(self, seconds: float) -> None:
        """Let time pass until the job ends; silent ranks do not check."""
        stop = self.now + seconds
        while self.now < stop and not self.ended:
            self.now += 0.1
            for rank in self.ranks:
                if rank.awake and not self.ended:
                    rank.check()


class Rank:
    """One rank: what it has started, and what it waits in since when."""

    def __init__(self, team: Team, rank: int, size: int, timeout_s: float) -> None:
        self.team, self.rank, self.size = team, rank, size
        self.starts = [0, 0]
        self.since: dict[int, float] = {}
        self.awake = True
        hosts = [f"n{rank}" for rank in range(size)]
        self.watchdog = Watchdog(self, hosts, self.end, timeout_s=timeout_s, clock=lambda: team.now)
        self.watchdog.add_source("engine", lambda: self.starts)

    def join(self, index: int) -> None:
        self.starts[index] += 1
        self.since[index] = self.team.now

    def check(self) -> None:
        waiting = None
        if self.since:
            index = min(self.since, key=self.since.__getitem__)
            seconds = self.team.now - self.since[index]
            waiting = Waiting(index, "first" if index == 0 else "second", self.starts[index], seconds)
        self.watchdog.check("engine", waiting)

    def tell(self, message: bytes) -> None:
        self.team.num_told += 1
        for peer, box in enumerate(self.team.boxes):
            if peer != self.rank:
                box.append((self.rank, message))

    def collect(self) -> Iterator[tuple[int, bytes]]:
        box = self.team.boxes[self.rank]
        while box:
            yield box.pop(0)

    def end(self, words: str) -> None:
        self.team.ended.append((self.rank, words))


def all_join(team: Team, index: int, *, but: int | None = None) -> None:
    for rank in team.ranks:
        if rank.rank != but:
            rank.join(index)


@pytest.mark.parametrize("absent", [0, 2, 3])
def test_the_lowest_waiting_rank_names_the_absent_one_after_timeout_and_grace(absent):
    team = Team(4)
    all_join(team, 0, but=absent)
    team.ranks[absent].awake = False
    team.run(200)
    ((speaker, words),) = team.ended
    assert min(set(range(4)) - {absent}) == speaker
    assert words.startswith(f"rank {absent} (host n{absent}) has not joined 'first' for 65 s")
    assert TIMEOUT_S + GRACE_S <= team.now <= TIMEOUT_S + GRACE_S + 0.5


def test_ranks_that_can_be_given_up_are_and_only_if_that_fails_the_job_ends():
    team, dismissed = Team(4), []
    for rank in team.ranks:
        rank.watchdog.dismiss = lambda culprits, rank=rank.rank: not dismissed.append((rank, tuple(culprits)))
    all_join(team, 0, but=2)
    team.ranks[2].awake = False
    team.run(TIMEOUT_S + GRACE_S + 1)
    assert set(dismissed) == {(0, (2,))}
    team.run(2 * GRACE_S)
    assert set(dismissed) == {(0, (2,)), (1, (2,)), (3, (2,))}, "the lowest may be on another node"
    assert not team.ended
    team.run(100)
    assert team.ended[0][1].startswith("rank 2 (host n2) has not joined 'first'")
    assert team.now < TIMEOUT_S + 8 * GRACE_S


def test_ranks_that_wait_for_each_other_cannot_be_given_up():
    team = Team(2)
    dismissed = []
    for rank in team.ranks:
        rank.watchdog.dismiss = lambda culprits: bool(dismissed.append(tuple(culprits)) or culprits)
        rank.join(rank.rank)
    team.run(100)
    assert set(dismissed) == {()}
    assert "wait for each other" in team.ended[0][1]


def test_nothing_is_told_before_the_timeout_nor_without_one():
    team = Team(3)
    all_join(team, 0, but=1)
    team.run(TIMEOUT_S - 0.2)
    assert (0, []) == (team.num_told, team.ended)
    off = Team(3, timeout_s=0.0)
    all_join(off, 0, but=1)
    off.run(1000)
    assert (0, []) == (off.num_told, off.ended)


def test_a_rank_that_joined_late_and_is_not_alarmed_itself_answers_and_is_not_blamed():
    team = Team(4)
    all_join(team, 0, but=2)
    team.ranks[2].awake = False
    team.ranks[3].since.clear()
    team.ranks[3].starts[0] = 0
    team.run(50)
    team.ranks[3].join(0)
    team.run(100)
    assert team.ended[0][1].startswith("rank 2 (host n2) has not joined")


def test_a_rank_that_computes_while_its_engine_looks_is_blamed_by_its_own_report():
    team = Team(3)
    all_join(team, 0, but=1)
    team.run(100)
    ((speaker, words),) = team.ended
    assert 0 == speaker
    assert words.startswith("rank 1 (host n1) has not joined")


def test_a_rank_that_comes_within_the_grace_saves_the_job_and_later_alarms_start_afresh():
    team = Team(3)
    all_join(team, 0, but=2)
    team.run(TIMEOUT_S + 2)
    assert team.num_told > 0
    for rank in team.ranks:
        rank.since.clear()
    team.ranks[2].starts[0] = 1
    team.run(100)
    assert [] == team.ended
    num_told = team.num_told
    team.run(50)
    assert num_told == team.num_told, "the alarm is over"
    # Now rank 0 is missing, and what it told in the first alarm must not speak for it.
    all_join(team, 0, but=0)
    team.ranks[0].awake = False
    team.run(100)
    ((speaker, words),) = team.ended
    assert 1 == speaker
    assert words.startswith("rank 0 (host n0) has not joined 'first' for 65 s, in which ranks 1, 2 wait")


def test_a_higher_rank_speaks_when_the_lower_one_that_should_does_not():
    team = Team(4)
    all_join(team, 0, but=3)
    team.ranks[3].awake = False
    team.run(TIMEOUT_S + 1)
    team.ranks[0].awake = False  # hangs after its alarm
    team.run(60)
    ((speaker, words),) = team.ended
    assert 1 == speaker
    assert "3 (host n3)" in words
    assert team.now <= TIMEOUT_S + 3 * GRACE_S


def test_a_rank_whose_alarm_comes_first_leaves_the_word_to_a_lower_one():
    team = Team(3)
    team.ranks[1].join(0)
    team.run(1.5)
    team.ranks[0].join(0)
    team.ranks[2].awake = False
    team.run(100)
    assert 0 == team.ended[0][0]
    assert TIMEOUT_S + GRACE_S + 1.5 <= team.now <= TIMEOUT_S + GRACE_S + 2


def test_the_rank_that_holds_up_an_earlier_collective_is_blamed():
    team = Team(4)
    for rank in (0, 1):
        team.ranks[rank].starts[0] = 1  # done there
        team.ranks[rank].join(1)
    team.ranks[3].join(0)
    team.ranks[2].awake = False
    team.run(100)
    words = team.ended[0][1]
    assert words.startswith("rank 2 (host n2) has not joined 'first' for 6")
    assert "s, in which rank 3 waits; the job is ended." in words


def test_ranks_that_lost_their_common_order_are_told_so():
    team = Team(3)
    team.ranks[0].join(0)
    team.ranks[1].join(0)
    team.ranks[2].join(1)
    team.run(100)
    assert "ranks 0, 1 in 'first', rank 2 in 'second'" in team.ended[0][1]


def test_two_sources_of_a_rank_are_both_seen_though_one_always_checks_first():
    team = Team(2)
    team.ranks[0].awake = team.ranks[1].awake = False
    watchdog = team.ranks[0].watchdog
    watchdog.add_source("world", lambda: [1])
    for tick in range(700):
        team.now = tick / 10
        watchdog.check("engine", None)
        watchdog.check("world", Waiting(0, "agreement", 1, team.now))
    assert team.ended[0][1].startswith("rank 1 (host n1) has not joined 'agreement'")


def test_a_wait_that_is_no_longer_checked_is_over():
    team = Team(2)
    team.ranks[0].join(0)
    watchdog = team.ranks[0].watchdog
    watchdog.add_source("world", lambda: [1])
    watchdog.check("world", Waiting(0, "agreement", 1, TIMEOUT_S + 1))
    assert team.num_told == 1
    team.ranks[0].since.clear()
    team.run(200)
    assert [] == team.ended


def test_what_the_job_was_at_is_told():
    team = Team(2, timeout_s=2.0)
    team.ranks[0].watchdog.doing = "step 17"
    team.ranks[0].join(0)
    team.run(10)
    assert team.ended[0][1].endswith("Look for what rank 1 was doing while others were at step 17.")
    assert team.now < 4.5  # the grace is not longer than the timeout
