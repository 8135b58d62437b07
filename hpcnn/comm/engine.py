"""The engine: carries on collectives over MPI, any number at once, without ever blocking inside MPI.

A collective is prepared once and started every step. From then on it is carried on by polling: whoever waits for one
polls them all; while nobody waits, a background thread does, with short sleeps (an MPI library moves large messages
only inside calls to it). Who waits spins for a moment only, then sleeps: the computation of others wants the core.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, cast

import numpy as np

from hpcnn import arrays
from hpcnn.arrays import Array
from hpcnn.comm.background import Background
from hpcnn.comm.collective import Collective, OfLibrary, Scheduled, check_fits
from hpcnn.comm.counters import Communication, Traffic
from hpcnn.comm.library import load, node_share
from hpcnn.comm.scratch import Scratch
from hpcnn.comm.small import SMALL_BYTES, SMALL_TYPES, run_small, scratch_bytes
from hpcnn.comm.staging import WHOLE, Staged, Touched, touched
from hpcnn.comm.verdict import Waiting
from hpcnn.comm.wait import Patience
from hpcnn.comm.watchdog import Watchdog
from hpcnn.errors import CommError
from hpcnn.gpu import Copies, CopyStream, Nccl
from hpcnn.plan.machine import DEFAULT, LONGEST_SEGMENT_BYTES, Machine
from hpcnn.plan.schedules import Schedule
from hpcnn.timeline import OFF, Timeline

if TYPE_CHECKING:
    from mpi4py import MPI

NUM_FIXED_TAGS = 1 << 14
"""Tags below are those of prepared collectives; the rest are drawn in turn for those that run once."""

SOURCE = "collectives"
"""Name of an engine's collectives in the watchdog's reports."""

URGENT = -(1 << 30)
"""Priority of what somebody is waiting for at this moment."""


class Engine:
    """Carries on collectives among the ranks of a communicator (collective to create and to free).

    The engine owns a duplicate of `comm`, so its messages never meet those of anyone else. All ranks must prepare the
    same collectives in the same order. One thread starts and waits; the engine's own only polls.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    segment_bytes : int
        Longest message; equal on all ranks.

    Attributes
    ----------
    segment_bytes : int
        Of what is prepared from now on.
    nodes : tuple of int
        The node of every rank.
    machine : Machine
        What links and additions cost, for algorithms that are left to choose; equal on all ranks.
    timeline : Timeline
        Where runs and waits are recorded.
    copies : Copies or None
        Between device and host; made with the first collective on a device array.
    nccl_members : dict of tuple of int to Nccl
        By their ranks.
    failure : Exception or None
        What went wrong in the MPI library: nothing gets on any more.
    comms : list of Intracomm
        On which messages travel.
    """

    def __init__(self, comm: MPI.Intracomm, *, segment_bytes: int = LONGEST_SEGMENT_BYTES) -> None:
        mpi = load()
        if comm.Is_inter():
            raise CommError(
                "comm: an intercommunicator has two groups of ranks; collectives need one. Merge() it first."
            )
        self.comm = comm.Dup()
        self.rank, self.size = int(self.comm.rank), int(self.comm.size)
        self.segment_bytes = segment_bytes
        share = node_share(self.comm)
        self.nodes = share.nodes
        self.machine: Machine = DEFAULT
        self.timeline: Timeline = OFF
        self.byte = mpi.BYTE
        self._waited_s = 0.0
        self._patience = Patience(awake=True, rationed=share.rationed)
        self._num_tags = int(self.comm.Get_attr(mpi.TAG_UB) or 32767) + 1
        self._next_tag = NUM_FIXED_TAGS
        self._num_messages = self._num_bytes = 0
        self._prepared: list[Collective] = []
        self._small: tuple[str, float] | None = None
        self._small_scratch = np.empty(0, np.uint8)
        self.scratch = Scratch()
        self.failure: BaseException | None = None
        self.comms = [self.comm]
        # In flight, most urgent first; who touches it, or carries one of them on, holds the lock.
        self._lock = threading.Lock()
        self._active: list[Collective] = []
        self._busy_s = 0.0
        self._busy_since = 0.0
        self._background: Background | None = None
        self._num_waiting = 0
        self._num_runs = 0
        self._watchdog: Watchdog | None = None
        self.copies: Copies | None = None
        self.nccl_members: dict[tuple[int, ...], Nccl] = {}

    # -- making -----------------------------------------------------------------------------------------------------

    def prepare(
        self,
        schedule: Schedule,
        array: Array,
        *,
        label: str = "",
        priority: int = 0,
        wire: str = "fp32",
        round_result: bool = False,
    ) -> Collective:
        """Return a collective that may be started again and again (collective).

        Parameters
        ----------
        schedule : Schedule
            This rank's schedule, for as many elements as `array` has.
        array : Array
            C-contiguous and writable, of any shape and number type; equal types on all ranks. One on a device is staged
            through the host.
        label : str
            What travels, for people.
        priority : int
            Of those in flight, the lowest is served first.
        wire : str
            Type of the elements in messages: "fp32" (the array's own type), or "bf16" or "fp16" for float32 arrays.
        round_result : bool
            Round the whole array to the wire type in the end, so that all ranks hold the same bits of it.

        Raises
        ------
        CommError
            If the array is not as above.
        """
        tag = len(self._prepared)
        if tag == NUM_FIXED_TAGS:
            raise CommError(f"comm: more than {NUM_FIXED_TAGS} collectives are prepared. Use larger buckets.")
        options = {"label": label, "priority": priority, "wire_type": wire, "round_result": round_result}
        return self.keep(
            self._staged(
                array,
                lambda host: self._scheduled(schedule, host, tag, **options),
                lambda: WHOLE if round_result and wire != "fp32" else touched(schedule, rounds=wire != "fp32"),
            )
        )

    def prepare_of_library(
        self,
        array: Array,
        begin: Callable[[MPI.Intracomm, np.ndarray], MPI.Request],
        end: Callable[[np.ndarray], None] = lambda _: None,
        *,
        parts: Touched,
        label: str = "",
        priority: int = 0,
        traffic: Traffic = Traffic(),  # noqa: B008 - frozen
        ranks: Sequence[int] | None = None,
    ) -> Collective:
        """Return a collective that starts by `begin`, on a communicator of its own, and ends by `end` (collective).

        Both get the array, flat and on the host; of one on a device, `parts` says what they read and write. The
        communicator has `ranks`, or all; every rank must be in one such group.
        """
        own = cast("MPI.Intracomm", self.comm.Split(0 if ranks is None else min(ranks), self.rank))
        self.comms.append(own)

        def make(host: np.ndarray) -> Collective:
            return OfLibrary(self, lambda: begin(own, host), lambda: end(host), label, priority, traffic)

        return self.keep(self._staged(array, make, lambda: parts))

    def _staged(
        self, array: Array, make: Callable[[np.ndarray], Collective], parts: Callable[[], Touched]
    ) -> Collective:
        """Return the collective that `make` makes of a host array, on an array wherever it lives."""
        return Staged(self, self.device_copies(), array, make, parts()) if arrays.on_device(array) else make(array)

    def device_copies(self) -> Copies:
        """Return `copies`, made if need be."""
        if self.copies is None:
            self.copies = CopyStream()
        return self.copies

    def keep(self, collective: Collective) -> Collective:
        """Return a prepared collective, having numbered it."""
        collective.index = len(self._prepared)
        self._prepared.append(collective)
        return collective

    def _scheduled(self, schedule: Schedule, array: np.ndarray, tag: int, **options: object) -> Scheduled:
        check_fits(schedule, array)
        return Scheduled(self, schedule, array, tag, **options)  # type: ignore[arg-type]

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, schedule: Schedule, array: Array, label: str = "") -> None:
        """Run a schedule once, in place on `array`, and return when this rank has done its part (collective).

        All ranks must run the same schedules in the same order. Parameters and errors are those of `prepare`.
        """
        if arrays.on_device(array):
            host = arrays.to_host(array)
            self.run(schedule, host, label)
            arrays.overwrite(array, host)
            return
        tag = self._next_tag
        self._next_tag = tag + 1 if tag + 1 < self._num_tags else NUM_FIXED_TAGS
        self._num_runs += 1
        check_fits(schedule, array)
        if array.nbytes <= SMALL_BYTES and array.dtype.char in SMALL_TYPES and not self._active:
            self._run_small(schedule, array, tag, label)
            return
        once = self._scheduled(schedule, array, tag, label=label, priority=URGENT)
        once.start()
        once.wait()

    def _run_small(self, schedule: Schedule, array: np.ndarray, tag: int, label: str) -> None:
        """Run a short schedule while nothing else is in flight."""
        begin = time.perf_counter()
        self._small = (label, begin)
        self._patience.reset()
        num_bytes = scratch_bytes(schedule, array.itemsize)
        self._small_scratch = self.scratch.take(num_bytes, self._small_scratch)
        run_small(self.comm, schedule, array.reshape(-1), tag, self._small_scratch[:num_bytes], self._pause)
        self._small = None
        self.count(schedule.num_messages, schedule.num_elements_sent * array.itemsize)
        end = time.perf_counter()
        self._busy_s += end - begin
        self._waited_s += end - begin
        self.timeline.add(label or "collective", "communication", begin, end)
        self.timeline.add(f"wait for {label}" if label else "wait", "wait", begin, end)

    def _pause(self) -> None:
        self._patience.pause()
        self.look_for_missing()

    def start(self, collective: Collective) -> None:
        """Begin a run of a prepared collective."""
        if not collective.done:
            raise CommError(f"comm: '{collective.label}' is still in flight; wait for it before starting it again.")
        with self._lock:
            collective.begin()
            if not self._active:
                self._busy_since = collective.started_at
            self._num_messages += collective.traffic.num_messages
            self._num_bytes += collective.traffic.num_bytes
            insort(self._active, collective, key=attrgetter("priority"))
            if collective.done:
                self._retire()
        if self._background is not None:
            self._background.wake()

    def poll(self) -> bool:
        """Carry on everything in flight as far as it goes without waiting; return whether anything moved."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            moved = done = False
            try:
                for collective in self._active:
                    if collective.advance():
                        moved, done = True, done or collective.done
            except Exception as error:
                self.failure = error  # for all who wait: a request that failed looks done when it is tested again
                raise
            if done:
                self._retire()
        return moved

    def wait_until(self, condition: Callable[[], bool], label: str = "") -> None:
        """Poll until `condition` holds, which is to depend on collectives in flight; the time counts as waited."""
        if condition():
            return
        begin = time.perf_counter()
        patience = self._patience
        patience.reset()
        self._num_waiting += 1
        try:
            while not condition():
                if self.poll():
                    patience.reset()
                elif not condition():
                    self._pause()
        finally:
            self._num_waiting -= 1
            if self._background is not None:
                self._background.wake()
        end = time.perf_counter()
        self._waited_s += end - begin
        self.timeline.add(f"wait for {label}" if label else "wait", "wait", begin, end)

    def carry_on_in_background(self) -> None:
        """From now on, carry on what is in flight while nobody waits."""
        if self._background is None and self.size > 1:
            self._background = Background(self)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._active

    @property
    def someone_waits(self) -> bool:
        """Whether a thread is in `wait_until`, and so carries everything on."""
        return self._num_waiting > 0

    # -- accounts ---------------------------------------------------------------------------------------------------

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent through this engine so far."""
        return Traffic(self._num_messages, self._num_bytes)

    @property
    def communication(self) -> Communication:
        """What this rank has sent, waited for and hidden so far."""
        with self._lock:
            busy_s = self._busy_s + (time.perf_counter() - self._busy_since if self._active else 0.0)
        return Communication(self.traffic, self._waited_s, max(0.0, busy_s - self._waited_s))

    def count(self, num_messages: int, num_bytes: int) -> None:
        """Add to what this rank has sent."""
        self._num_messages += num_messages
        self._num_bytes += num_bytes

    def watch(self, watchdog: Watchdog, source: str = SOURCE, members: Sequence[int] | None = None) -> None:
        """From now on, let the watchdog see what has been in flight for longest; see `Watchdog.add_source`."""
        self._watchdog, self._source, self._called = watchdog, source, members or range(self.size)
        watchdog.add_source(source, self._starts, members)

    def look_for_missing(self) -> None:
        """Let the watchdog look, if there is one."""
        if self._watchdog is None:
            return
        waiting = None
        small = self._small
        if small is not None:
            waiting = Waiting(0, small[0], self._num_runs, time.perf_counter() - small[1])
        with self._lock:
            if self._active:
                oldest = min(self._active, key=lambda collective: collective.started_at)
                missing = ", ".join(str(self._called[rank]) for rank in oldest.waiting_for())
                waiting = Waiting(
                    oldest.index + 1,
                    oldest.label,
                    oldest.num_starts if oldest.index >= 0 else self._num_runs,
                    time.perf_counter() - oldest.started_at,
                    f"messages from rank {missing}" if missing else "",
                )
        self._watchdog.check(self._source, waiting)

    def _starts(self) -> list[int]:
        """Return how many collectives ran once, and how often each prepared one has been started."""
        return [self._num_runs, *(collective.num_starts for collective in self._prepared)]

    def _retire(self) -> None:
        """Take what is done out of flight. The lock is held."""
        for collective in self._active if self.timeline is not OFF else ():
            if collective.done:
                self.timeline.add(
                    collective.label or "collective",
                    "communication",
                    collective.started_at,
                    collective.finished_at,
                    bytes=collective.traffic.num_bytes,
                )
        self._active = [collective for collective in self._active if not collective.done]
        if not self._active:
            self._busy_s += time.perf_counter() - self._busy_since

    def free(self) -> None:
        """Stop the thread and free the engine's communicator (collective)."""
        self.stop()
        self.comm.Free()

    def stop(self) -> None:
        """Stop the thread, leaving what is in flight."""
        if self._background is not None:
            self._background.close()
            self._background = None
