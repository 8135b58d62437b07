"""All ranks of the job: who they are, what each may use, and how they come to one verdict."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hpcnn.comm import abort
from hpcnn.comm.abort import run_and_exit as run_and_exit
from hpcnn.comm.collective import check_array
from hpcnn.comm.collectives import engine_of, made_engine
from hpcnn.comm.counters import Communication
from hpcnn.comm.engine import Engine
from hpcnn.comm.failure import Process, agreed, guarded, kill_hung
from hpcnn.comm.library import NodeShare, load, node_share
from hpcnn.comm.verdict import Waiting, name_ranks
from hpcnn.comm.wait import Patience, wait
from hpcnn.comm.watchdog import MpiPost, Watchdog
from hpcnn.errors import CommError, HpcnnError, PlanError

if TYPE_CHECKING:
    from mpi4py import MPI

OMP_NUM_THREADS = "OMP_NUM_THREADS"

WATCH_S = 0.25
"""How often the watchdog learns that this rank still waits."""

GATHER_TAG, PASS_TAG = 7002, 7003

CHUNK_BYTES = 1 << 30
"""Messages are cut here: MPI counts in 31 bits."""


class World:
    """The ranks of the job, made once by `start`, or a group of them, made by `split`.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        A duplicate of COMM_WORLD: messages on it meet nobody else's.
    rank, size : int
        This rank and the number of ranks.
    local_rank, local_size : int
        The same among the ranks of this node.
    hostnames : tuple of str
        The node of every rank.
    num_threads : int
        Threads that BLAS and OpenMP use in this rank.
    threads_are_chosen : bool
        Whether the user has set their number (OMP_NUM_THREADS).
    watchdog : Watchdog
        Names the rank that the others wait for in vain; off until its `timeout_s` is set.
    ranks : tuple of int
        What the ranks of this world are called in that of `start`.
    """

    def __init__(
        self, comm: MPI.Intracomm, share: NodeShare, num_threads: int, ranks: Sequence[int] | None = None
    ) -> None:
        self.comm = comm
        self._share = share
        self.ranks = tuple(range(comm.size)) if ranks is None else tuple(ranks)
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.local_rank = share.local_rank
        self.local_size = share.local_size
        self.num_threads = num_threads
        self.threads_are_chosen = False
        self.hostnames: tuple[str, ...] = tuple(comm.allgather(load().Get_processor_name()))
        self._processes: list[Process] = comm.allgather(Process.here())
        self._patience = Patience(awake=True, rationed=share.rationed)
        places = self.hostnames
        if ranks is not None:
            places = tuple(f"{host}, rank {rank} of all" for host, rank in zip(places, ranks, strict=True))
        self._post = MpiPost(comm.Dup())
        self.watchdog = Watchdog(self._post, places, abort.end_job)
        self._num_started, self._label, self._source = 0, "", "world"
        self.watchdog.add_source(self._source, lambda: (self._num_started,))

    def __repr__(self) -> str:
        return f"World(rank={self.rank}, size={self.size}, host={self.hostnames[self.rank]!r})"

    def split(self, color: int) -> World:
        """Return the world of the ranks that bring the same `color`, in their order here (collective).

        It has its own communicator, engine and watchdog, whose limit is set apart. The place on the node stays that
        among all ranks.
        """
        comm = cast("MPI.Intracomm", self.comm.Split(color, self.rank))
        ranks = [self.ranks[rank] for rank in comm.allgather(self.rank)]
        return World(comm, self._share, self.num_threads, ranks)

    def outlive(self) -> None:
        """From now on have the watchdog kill a rank that hangs: the others are to go on without it."""
        self.watchdog.dismiss = lambda culprits: kill_hung(culprits, self._processes)

    def revoke(self) -> None:
        """Raise an error on all ranks that wait for anything here; only `all_well` and `survivors` work afterwards."""
        if self not in _abandoned:
            _abandoned.append(self)
        engine = made_engine(self.comm)
        self._post.revoke()
        for comm in [self.comm, *([] if engine is None else engine.comms)]:
            comm.Revoke()
        if engine is not None:
            engine.stop()

    def all_well(self, well: bool, timeout_s: float) -> bool:
        """Return whether no rank has died and all bring True; the same on all (collective, also when revoked).

        The job is ended if that takes longer than `timeout_s` and a minute; 0: wait for ever.
        """
        with guarded(timeout_s, abort.end_job):
            return agreed(self.comm, well)

    def survivors(self, timeout_s: float) -> World:
        """Return the world of those that are alive, after `revoke` (collective among them).

        Ranks keep their order and, in `ranks`, their names. From here on an exception that nobody catches ends the job
        of the new world. The job is ended if they do not find each other in `timeout_s` or a minute; 0: wait for ever.
        """
        comm, world = self.comm, None
        with guarded(timeout_s, abort.end_job):
            while True:
                comm = cast("MPI.Intracomm", comm.Shrink())
                places = comm.Get_group().Translate_ranks(list(range(comm.size)), self.comm.Get_group())
                try:
                    world = World(comm, self._share, self.num_threads, [self.ranks[place] for place in places])
                    world.threads_are_chosen = self.threads_are_chosen
                    abort.install(comm.Dup())
                except load().Exception:  # another has died
                    comm.Revoke()
                if agreed(comm, world is not None) and world is not None:
                    return world

    def pass_on(self, data: np.ndarray, received: np.ndarray, distance: int) -> None:
        """Send bytes so many ranks ahead, and receive those of the rank as far behind (collective)."""
        peer, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
        cuts = [range(0, array.size, CHUNK_BYTES) for array in (data, received)]
        requests = [self.comm.Irecv(received[at : at + CHUNK_BYTES], source, PASS_TAG) for at in cuts[1]]
        requests += [self.comm.Isend(data[at : at + CHUNK_BYTES], peer, PASS_TAG) for at in cuts[0]]
        for number, request in enumerate(requests):
            self._finish(request, "" if number else "copy of the state")

    def limit_threads(self, count: int) -> None:
        """Hold BLAS and OpenMP to `count` threads in this rank, unless the user has chosen their number."""
        if not self.threads_are_chosen:
            _limit_threads(count)
            self.num_threads = count

    def free(self) -> None:
        """Give back the communicators, and the arrays of prepared collectives; for worlds of `split` (collective)."""
        self.comm.Free()  # and its engine with it
        self._post.free()

    def report_to(self, parent: World, name: str) -> None:
        """Have this world, split from `parent`, watched by the parent's watchdog, which knows who waits elsewhere.

        Parameters
        ----------
        name : str
            Equal on the ranks of this world, and that of no other that the watchdog has.
        """
        members = [parent.ranks.index(rank) for rank in self.ranks]
        self.watchdog, self._source = parent.watchdog, f"{name}: world"
        self.watchdog.add_source(self._source, lambda: (self._num_started,), members)
        self.engine.watch(self.watchdog, f"{name}: collectives", members)

    def barrier(self) -> None:
        """Return once all ranks have come here (collective)."""
        self._finish(self.comm.Ibarrier(), "barrier")

    def broadcast_obj(self, value: Any, root: int = 0) -> Any:
        """Return the `value` of rank `root` on all ranks (collective); any object that pickles."""
        data = np.frombuffer(bytearray(pickle.dumps(value)), np.uint8) if self.rank == root else np.empty(0, np.uint8)
        length = np.array([data.size], np.int64)
        self._finish(self.comm.Ibcast(length, root), "broadcast")
        if self.rank != root:
            data = np.empty(length[0], np.uint8)
        self.broadcast(data, root)
        return value if self.rank == root else pickle.loads(data.tobytes())

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """Overwrite `array`, C-contiguous and equally long everywhere, with that of rank `root` (collective)."""
        check_array(array)
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, CHUNK_BYTES):
            self._finish(self.comm.Ibcast(data[start : start + CHUNK_BYTES], root), "broadcast")

    def gather_obj(self, value: Any, root: int = 0) -> list[Any] | None:
        """Return the values of all ranks, rank 0's first, on rank `root` and None elsewhere (collective).

        Any object that pickles. Not for use inside a step: the root receives from one rank after the other.
        """
        data = np.frombuffer(bytearray(pickle.dumps(value)), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self._finish(self.comm.Igather(np.array([data.size], np.int64), lengths, root), "gather")
        if self.rank != root:
            for start in range(0, data.size, CHUNK_BYTES):
                self._finish(self.comm.Isend(data[start : start + CHUNK_BYTES], root, GATHER_TAG))
            return None
        values = []
        for peer, length in enumerate(lengths.tolist()):
            if peer == root:
                values.append(value)
                continue
            data = np.empty(length, np.uint8)
            for start in range(0, length, CHUNK_BYTES):
                self._finish(self.comm.Irecv(data[start : start + CHUNK_BYTES], peer, GATHER_TAG))
            values.append(pickle.loads(data.data))
        return values

    @property
    def engine(self) -> Engine:
        """The engine that carries on the collectives over `comm` (collective at its first use)."""
        return engine_of(self.comm)

    @property
    def communication(self) -> Communication:
        """What this rank has sent and waited for in collectives over `comm`, without messages of agreement."""
        return self.engine.communication

    def agree(self, error: HpcnnError | None = None, seconds: float | None = None) -> None:
        """Raise on all ranks what any rank brings along, or return everywhere (collective).

        Parameters
        ----------
        error : HpcnnError, optional
            What went wrong on this rank. If several ranks bring one, the lowest is heard.
        seconds : float, optional
            How long to wait for the others, if they may not come; then return.

        Raises
        ------
        HpcnnError
            Of the same class and with the same words on all ranks, "(on rank R)" added when there are several.
        """
        mine = np.array([self.size if error is None else self.rank], np.int64)
        first = np.empty_like(mine)
        request = self.comm.Iallreduce(mine, first, load().MIN)
        if seconds is None:
            self._finish(request, "agreement")
        elif not wait(request.Test, self._patience, seconds):
            return
        root = int(first[0])
        if root == self.size:
            return
        kind, words = self.broadcast_obj((type(error), str(error)), root)
        raise kind(f"{words} (on rank {root})" if self.size > 1 else words) from error

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Agree at the end of a `with` block: an HpcnnError inside it, on any rank, is raised on all (collective)."""
        error = None
        try:
            yield
        except HpcnnError as raised:
            error = raised
        self.agree(error)

    def compare(
        self,
        digests: Mapping[str, str | bytes],
        *,
        source: str = "the configuration",
        rule: str = "read the same configuration",
    ) -> None:
        """Raise on all ranks if any holds other things than rank 0 (collective).

        One all-gather of a few bytes, if all is well.

        Parameters
        ----------
        digests : mapping of str to str or bytes
            By the name of the thing, what stands for its contents: a digest, or a text of any length. What others
            follow from comes first: of several things that differ, the first is named.
        source : str
            Where the things come from; for the message.
        rule : str
            What all ranks must do; for the message.

        Raises
        ------
        PlanError
            With the same words on all ranks.
        """
        details = json.dumps([(name, _digest(value).hex()) for name, value in digests.items()]).encode()
        row = np.frombuffer(_digest(details) + len(details).to_bytes(8, "big"), np.uint8)
        rows = np.empty((self.size, row.size), np.uint8)
        self._finish(self.comm.Iallgather(row, rows), "comparison")
        if (rows == rows[0]).all():
            return
        longest = max(int.from_bytes(row[-8:].tobytes(), "big") for row in rows)
        padded = np.empty((self.size, longest), np.uint8)
        self._finish(self.comm.Iallgather(np.frombuffer(details.ljust(longest), np.uint8), padded), "comparison")
        everyone = [dict(json.loads(row.tobytes())) for row in padded]
        names = dict.fromkeys(name for things in everyone for name in things)  # those of rank 0 first
        for name in names:
            others = [rank for rank, things in enumerate(everyone) if things.get(name) != everyone[0].get(name)]
            if others:
                raise PlanError(
                    f"plan: {name_ranks(others, self.hostnames)} {'has' if len(others) == 1 else 'have'} another {name}"
                    f" than rank 0; all ranks must {rule}. Check that {source} is the same on every node."
                )

    def _finish(self, request: MPI.Request, label: str = "") -> None:
        """Wait for a request; `label` names the collective that begins with it, the same on all ranks."""
        if label:
            self._num_started += 1
            self._label = label
        begin = time.monotonic()
        while not wait(request.Test, self._patience, WATCH_S):
            self.watchdog.check(self._source, Waiting(0, self._label, self._num_started, time.monotonic() - begin))
        self.watchdog.check(self._source, None)


_abandoned: list[World] = []
"""Worlds that were outlived: the library may still write into the arrays of messages that were given up."""


@functools.cache
def start() -> World:
    """Initialise MPI and return the world; the same one on every call (collective on the first).

    BLAS and OpenMP are held to this rank's share of the cores, unless OMP_NUM_THREADS is set. From here on an
    exception that nobody catches, on any rank and in any thread, ends the job instead of hanging it.

    Raises
    ------
    CommError
        If there is no MPI library, or the launcher started several tasks which MPI does not connect.
    """
    mpi = load()
    refuse_singleton(mpi.COMM_WORLD.size, os.environ)
    comm = mpi.COMM_WORLD.Dup()
    share = node_share(comm)
    chosen = _chosen_threads()
    if not chosen and (share.num_sharing > 1 or share.num_threads < share.num_cores):
        _limit_threads(share.num_threads)
    world = World(comm, share, chosen or share.num_threads)
    world.threads_are_chosen = chosen > 0
    abort.install(comm.Dup())
    return world


def _digest(value: str | bytes) -> bytes:
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).digest()


def refuse_singleton(size: int, environment: Mapping[str, str]) -> None:
    """Raise CommError if the launcher says several tasks and MPI says one.

    Such a job is N trainings that know nothing of each other and write over each other's files, all of which "succeed".
    The launcher that starts the ranks itself is believed before Slurm, in whose allocation it may run.
    """
    if size != 1:
        return
    for names in (("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"), ("SLURM_STEP_NUM_TASKS",), ("SLURM_NTASKS",)):
        for name in names:
            if name == "SLURM_NTASKS" and "SLURM_STEP_ID" not in environment:
                continue  # a batch script, not a task
            if not environment.get(name, "").isdecimal():
                continue
            tasks = int(environment[name])
            if tasks > 1:
                raise CommError(
                    f"comm: the launcher started {tasks} tasks ({name}) but MPI connects only 1; each would train"
                    " alone. Under Slurm use srun --mpi=pmix or --mpi=pmi2, whichever this MPI library was built for;"
                    " otherwise use the mpiexec that belongs to the library."
                )
            return


def _chosen_threads() -> int:
    """Return the number of threads that the user has set; 0: none."""
    chosen = os.environ.get(OMP_NUM_THREADS, "").split(",")[0].strip()
    return int(chosen) if chosen.isdecimal() else 0


def _limit_threads(count: int) -> None:
    """Hold BLAS and OpenMP to so many threads."""
    import threadpoolctl

    threadpoolctl.threadpool_limits(count)
    os.environ[OMP_NUM_THREADS] = str(count)  # for libraries that load later
