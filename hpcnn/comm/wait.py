"""The one policy for waiting on messages: poll, briefly at full speed, then with sleeps that grow.

MPI's blocking waits spin. Under a CPU quota, or with more ranks than cores, that eats the time the other ranks need to
get ready. So nothing here blocks inside MPI: a wait is a loop of Test calls with a `Patience` between them. Its short
phase awake offers the core to whoever else wants it after every poll. A rank whose quota grants less than a core pays
for polls with the computation that comes after them, and does without that phase.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SPIN_S = 300e-6
"""Some times what a short message takes over an ordinary network."""

FIRST_SLEEP_S, LONGEST_SLEEP_S = 20e-6, 1e-3
RATIONED_SLEEPS_S = 200e-6, 2e-3
"""The same under such a quota: there a message takes as long to be worked on."""

BUSY_POLL_S = 20e-6
"""A poll that takes longer has moved data, if not yet a whole message. (An idle one takes about a microsecond.)"""


class Patience:
    """How long to wait before the next poll.

    Parameters
    ----------
    awake : bool
        Poll for `SPIN_S` seconds without sleeping, for low latency: where the caller has nothing else to do. Otherwise
        sleep from the first failed poll on.
    rationed : bool
        Processor time is scarcer than time: never spin, and sleep longer.
    """

    __slots__ = ("_first_s", "_last", "_longest_s", "_sleep_s", "_spin_s", "_spun_s")

    def __init__(self, *, awake: bool, rationed: bool = False) -> None:
        self._spin_s = SPIN_S if awake and not rationed else 0.0
        self._first_s, self._longest_s = RATIONED_SLEEPS_S if rationed else (FIRST_SLEEP_S, LONGEST_SLEEP_S)
        self.reset()

    def reset(self) -> None:
        """Start over, after something has arrived."""
        self._sleep_s = self._first_s
        self._spun_s = 0.0
        self._last = time.perf_counter()

    def pause(self) -> None:
        """Let time pass after a poll that finished nothing."""
        now = time.perf_counter()
        polled_s = now - self._last
        if polled_s > BUSY_POLL_S:
            self.reset()
            return
        if self._spun_s < self._spin_s:
            self._spun_s += polled_s
            os.sched_yield()
            self._last = time.perf_counter()
            return
        time.sleep(self._sleep_s)
        self._sleep_s = min(2.0 * self._sleep_s, self._longest_s)
        self._last = time.perf_counter()


def wait(done: Callable[[], bool], patience: Patience, timeout_s: float | None = None) -> bool:
    """Poll `done` until it is true and return True, or return False after `timeout_s` seconds."""
    patience.reset()
    give_up = None if timeout_s is None else time.perf_counter() + timeout_s
    while not done():
        if give_up is not None and time.perf_counter() > give_up:
            return False
        patience.pause()
    return True
