"""The waiting policy: a short spin, then sleeps that grow."""

from __future__ import annotations

import time

import pytest

from hpcnn.comm import wait as waiting
from hpcnn.comm.wait import FIRST_SLEEP_S, LONGEST_SLEEP_S, RATIONED_SLEEPS_S, SPIN_S, Patience, wait


class Clock:
    """Time that passes only in sleeps, and a microsecond a look."""

    def __init__(self) -> None:
        self.now, self.sleeps = 0.0, []

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def test_awake_the_first_microseconds_pass_without_sleep(clock):
    patience = Patience(awake=True)
    polled = 0.0
    while polled < SPIN_S - 1e-6:
        clock.now += 3e-6
        patience.pause()
        polled += 4e-6  # and the look at the clock
    assert [] == clock.sleeps
    for _ in range(3):
        patience.pause()
    assert [FIRST_SLEEP_S] == clock.sleeps[:1]


def test_a_rank_that_is_awake_offers_its_core_after_every_poll(monkeypatch):
    offers = []
    monkeypatch.setattr(waiting.os, "sched_yield", lambda: offers.append(1))
    patience = Patience(awake=True)
    patience.pause()
    patience.pause()
    assert len(offers) == 2


def test_otherwise_the_first_failed_poll_sleeps(clock):
    Patience(awake=False).pause()
    assert [FIRST_SLEEP_S] == clock.sleeps


def test_where_processor_time_is_rationed_no_poll_is_made_in_vain(clock):
    patience = Patience(awake=True, rationed=True)
    for _ in range(12):
        patience.pause()
    first, longest = RATIONED_SLEEPS_S
    assert (first, 2 * first, longest, 12) == (*clock.sleeps[:2], clock.sleeps[-1], len(clock.sleeps))


def test_sleeps_double_up_to_the_longest_and_start_over_after_an_arrival(clock):
    patience = Patience(awake=False)
    for _ in range(12):
        patience.pause()
    assert clock.sleeps[1] == 2 * clock.sleeps[0]
    assert LONGEST_SLEEP_S == clock.sleeps[-1] == max(clock.sleeps)
    patience.reset()
    patience.pause()
    assert FIRST_SLEEP_S == clock.sleeps[-1]


def test_wait_gives_up_after_its_timeout():
    begin = time.monotonic()
    assert not wait(lambda: False, Patience(awake=False), timeout_s=0.02)
    assert time.monotonic() - begin >= 0.02
    answers = iter([False, False, True])
    assert wait(lambda: next(answers), Patience(awake=True))


def test_a_poll_that_took_long_is_taken_for_progress(clock):
    patience = Patience(awake=False)
    for _ in range(3):
        patience.pause()
    num_sleeps = len(clock.sleeps)
    clock.now += 100e-6  # as when a poll copies a megabyte
    patience.pause()
    assert num_sleeps == len(clock.sleeps)
    patience.pause()
    assert FIRST_SLEEP_S == clock.sleeps[-1]
