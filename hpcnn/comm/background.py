"""The thread that carries an engine's collectives on while nobody waits for them."""

from __future__ import annotations

import atexit
import threading
import time
from typing import TYPE_CHECKING

from hpcnn.comm.failure import rank_failure

if TYPE_CHECKING:
    from hpcnn.comm.engine import Engine

IDLE_S = 0.5
"""How often an idle thread answers watchdogs of other ranks."""

SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 500e-6, 2e-3
"""Between two polls, also while messages arrive: the library has some under way all the time, and every poll takes the
core, its caches and Python's lock from the computation."""


class Background:
    """The thread that carries an engine's collectives on while nobody waits for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="communication", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # runs before MPI ends: mpi4py registered its own earlier

    def wake(self) -> None:
        """Look at the engine again: something was started, or nobody waits any more."""
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """Stop the thread, leaving what is in flight."""
        atexit.unregister(self.close)
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        engine, sleep_s = self._engine, SHORTEST_SLEEP_S
        while True:
            with self._wake:
                if not self._closed and (engine.idle or engine.someone_waits):
                    self._wake.wait(IDLE_S)
                if self._closed:
                    return
            if engine.someone_waits:
                continue
            try:
                sleep_s = SHORTEST_SLEEP_S if engine.poll() else min(2 * sleep_s, LONGEST_SLEEP_S)
                engine.look_for_missing()  # also when idle: "I have joined that" helps others to find who has not
            except Exception as error:
                if rank_failure(error) is None:
                    raise
                engine.failure = error  # for whoever waits next
                return
            if not engine.idle:
                time.sleep(sleep_s)
