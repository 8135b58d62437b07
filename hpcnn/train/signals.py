"""Requests to stop: a signal sets a flag, the loop finishes its step, writes a checkpoint and ends with code 75.

SIGUSR1 is the one signal that every launcher forwards to the ranks, SIGTERM is what batch systems send before they
kill, SIGINT is Ctrl-C. A flag is all a handler may touch: one rank that left a collective would hang the others.
The ranks agree on the flag by a small all-reduce, which is the loop's business.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

EXIT_STOPPED = 75
"""Exit code of a run that wrote a checkpoint because it was asked to stop (EX_TEMPFAIL: run me again)."""

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# Launcher, batch system and terminal may each deliver one and the same request.
_SAME_REQUEST_S = 1.0


class StopRequest:
    """Context manager that turns signals into the flag `requested`.

    The first signal asks the loop to stop. A second SIGTERM or SIGINT of the same kind, at least a second later, means
    now: the process ends at once with code 128 + signal number, without MPI, buffers or checkpoint. SIGUSR1 never does.
    On leaving, the handlers of before are back. Outside the main thread, where Python allows no handlers, it only
    holds the flag.

    Attributes
    ----------
    requested : bool
        Whether to stop after this step; the loop may set it too.
    reason : str
        Name of the signal, such as "SIGUSR1"; empty before one came.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self._first_s: dict[int, float] = {}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # held back since the command began
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def retire(self) -> None:
        """Let no signal take the place of the exit code from here on, not even behind the block: all is said or saved.

        Ranks do not end at the same moment. A launcher that sees the first one end with another code than 0, such as 75
        or 2, sends SIGTERM to those that are still ending (`srun --kill-on-bad-exit`), and would report that instead.
        """
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._first_s.setdefault(number, now)
        if number != signal.SIGUSR1 and now - first >= _SAME_REQUEST_S:
            os._exit(128 + number)
        if not self.requested:
            self.reason = signal.Signals(number).name
            self.requested = True
