"""The watchdog: ends a job that stands still, and names the rank that never joined.

A rank that hangs, in a read from a dead file system for instance, holds all others for ever: they wait in a collective
that it never joins, and none of them knows for whom. So whoever waits calls `check` every now and then. After
`timeout_s` seconds a rank raises the alarm: it tells all others how often it has started each collective and what it
waits in. Those that look at their messages answer in kind, while the alarm lasts. After a time of grace the lowest rank
that is alarmed draws the conclusion (see `hpcnn.comm.verdict`), says one line and ends the job; the others keep silent.

Nothing here waits. A job without an alarm sends no message and pays a glance at the clock for a check.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hpcnn.comm.library import load
from hpcnn.comm.verdict import Report, Waiting, absent, conclude

if TYPE_CHECKING:
    from mpi4py import MPI

GRACE_S = 5.0
"""How long reports are collected."""

LOOK_S = 0.1
"""Checks that follow each other faster do nothing."""

REPEATS = 4
"""How often a report is told within the time of grace: one that is older than that time is no longer true."""

DISMISSALS = 6
"""Times of grace within which ranks that were given up must be dead."""

STAGGER_S, LONGEST_STAGGER_S = 0.25, 2.0
"""Ranks that give up on the lowest one speak in order of rank, this far apart: the first ends the rest."""


class Post(Protocol):
    """How a watchdog reaches the others; neither function waits."""

    rank: int
    size: int

    def tell(self, message: bytes) -> None:
        """Send a message to all other ranks."""
        ...

    def collect(self) -> Iterator[tuple[int, bytes]]:
        """Yield the messages that have arrived, with their senders, in the order of each sender."""
        ...


class Watchdog:
    """Watches how long this rank waits. May be called from any thread.

    Parameters
    ----------
    post : Post
        The way to the other ranks.
    hostnames : sequence of str
        The node of every rank.
    end : callable
        Gets the line that says why, reports it and ends the job.
    clock : callable
        Returns the time in seconds.

    Attributes
    ----------
    timeout_s : float
        How long a collective may be in flight; 0 turns the watchdog off. Equal on all ranks, to be set before waiting.
    doing : str
        What the job is at, such as "step 17"; for the line.
    dismiss : callable
        Gets the ranks to blame for the standstill, and returns whether the job goes on without them.
    """

    def __init__(
        self,
        post: Post,
        hostnames: Sequence[str],
        end: Callable[[str], None],
        *,
        timeout_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout_s = timeout_s
        self.doing = ""
        self.dismiss: Callable[[Sequence[int]], bool] = lambda culprits: False
        self._post = post
        self._hostnames = hostnames
        self._end = end
        self._clock = clock
        self._lock = threading.Lock()
        self._starts: dict[str, Callable[[], Sequence[int]]] = {}
        self._members: dict[str, tuple[int, ...]] = {}
        self._waiting: dict[str, tuple[Waiting, float]] = {}  # with the time of the check
        self._heard: dict[int, tuple[Report, float]] = {}  # with the time of arrival
        self._alarmed_at: float | None = None
        self._next_look = self._next_tell = 0.0

    @property
    def grace_s(self) -> float:
        """How long reports are collected before a conclusion."""
        return min(GRACE_S, self.timeout_s)

    def add_source(
        self, source: str, starts: Callable[[], Sequence[int]], members: Sequence[int] | None = None
    ) -> None:
        """Take up something that runs collectives.

        Parameters
        ----------
        source : str
            Its name, equal on all ranks.
        starts : callable
            Returns how many times this rank has started each of its collectives, numbered alike on all ranks. It is
            called in the thread that checks.
        members : sequence of int, optional
            The ranks that run it together, if not all.
        """
        with self._lock:
            self._starts[source] = starts
            if members is not None:
                self._members[source] = tuple(members)

    def check(self, source: str, waiting: Waiting | None) -> None:
        """Notice how long a source has waited, and do what is due.

        To be called several times a second while something is in flight, best also when nothing is, since the answer
        "I have joined that" helps the others to find who has not. Does not return when the job is ended.

        Parameters
        ----------
        source : str
            As given to `add_source`.
        waiting : Waiting or None
            What has been in flight for the longest time; None if nothing is.
        """
        if self.timeout_s <= 0 or self._post.size == 1:
            return
        now = self._clock()
        # Kept even if there is nothing more to do: another thread's checks may always be the ones that look.
        if waiting is None:
            self._waiting.pop(source, None)
        else:
            self._waiting[source] = waiting, now
        if now < self._next_look or not self._lock.acquire(blocking=False):
            return
        try:
            self._next_look = now + LOOK_S
            self._look(now)
        finally:
            self._lock.release()

    def _look(self, now: float) -> None:
        for peer, message in self._post.collect():
            self._heard[peer] = Report.decode(message), now
        mine = self._report(now)
        if not mine.alarmed:
            self._alarmed_at = None
        elif self._alarmed_at is None:
            self._alarmed_at = now
            self._next_tell = now
        fresh = {peer: report for peer, (report, heard) in self._heard.items() if now - heard <= self.grace_s}
        others = [peer for peer, report in fresh.items() if report.alarmed]
        if (mine.alarmed or others) and now >= self._next_tell:
            self._next_tell = now + self.grace_s / REPEATS
            self._post.tell(mine.encode())
        if self._alarmed_at is None:
            return
        overdue_s = now - self._alarmed_at - self._patience_s(others)
        if overdue_s >= 0:
            rank = self._post.rank
            reports = {**fresh, rank: mine}
            # Those that are dismissed are dead soon, or whoever was to see to that cannot.
            if overdue_s > DISMISSALS * self.grace_s or not self.dismiss(absent(reports, self._hostnames)):
                self._end(conclude(rank, reports, self._hostnames, self.doing))

    def _report(self, now: float) -> Report:
        """Return what there is to tell of this rank; a wait that is no longer checked is over."""
        waiting = {
            source: one
            for source, (one, checked) in list(self._waiting.items())
            if now - checked <= max(self.grace_s / 2, 2 * LOOK_S)
        }
        return Report(
            starts={source: [int(count) for count in starts()] for source, starts in self._starts.items()},
            waiting=waiting,
            members={source: self._members[source] for source in waiting if source in self._members},
            alarmed=any(one.seconds > self.timeout_s for one in waiting.values()),
        )

    def _patience_s(self, alarmed: Sequence[int]) -> float:
        """Return how long after its own alarm this rank speaks, which is later if a lower one should."""
        num_before = sum(peer < self._post.rank for peer in alarmed)
        if num_before == 0:
            return self.grace_s
        return 2 * self.grace_s + min(num_before * STAGGER_S, LONGEST_STAGGER_S)


class MpiPost:
    """Messages of watchdogs over MPI.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        For the watchdog alone.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank: int = comm.rank
        self.size: int = comm.size
        self._comm = comm
        self._byte = load().BYTE
        self._on_their_way: dict[int, tuple[MPI.Request, bytes]] = {}

    def revoke(self) -> None:
        """Raise an error on all ranks that use this."""
        self._comm.Revoke()

    def free(self) -> None:
        """Give the communicator back (collective)."""
        self._comm.Free()

    def tell(self, message: bytes) -> None:
        """Send a message to all other ranks; one that has not yet fetched the last gets none."""
        for peer in range(self.size):
            last = self._on_their_way.get(peer)
            if peer != self.rank and (last is None or last[0].Test()):
                self._on_their_way[peer] = self._comm.Isend([message, self._byte], peer), message

    def collect(self) -> Iterator[tuple[int, bytes]]:
        """Yield the messages that have arrived, with their senders."""
        mpi = load()
        for request, _ in self._on_their_way.values():
            request.Test()  # nothing moves otherwise
        status = mpi.Status()
        while (found := self._comm.Improbe(status=status)) is not None:
            message = np.empty(status.Get_count(self._byte), np.uint8)
            found.Recv([message, self._byte])
            yield status.Get_source(), message.tobytes()
