"""How far the clocks of the ranks are apart, so that times taken on several nodes can be laid side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcnn.comm.wait import Patience, wait

if TYPE_CHECKING:
    from mpi4py import MPI

NUM_PINGS = 32
"""Round trips of a rank; a handful would do on an idle machine, more find a quiet moment on a busy one."""

TAG = 7001


class Ping(NamedTuple):
    """One round trip: sent and returned by this rank's clock, answered in between by the root's."""

    sent_s: float
    root_s: float
    returned_s: float


def offset_to_root(
    comm: MPI.Intracomm, *, root: int = 0, clock: Callable[[], float] = time.perf_counter, num_pings: int = NUM_PINGS
) -> float:
    """Return the seconds to add to this rank's clock to get that of rank `root` (collective).

    Every rank in turn asks the root for its time, several times, and believes the fastest answer. The offset is off by
    half of that round trip at most: some microseconds. Clocks drift, by milliseconds in an hour; measure close to the
    times that are to be compared.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks. No other messages between them may use the tag `TAG`.
    root : int
        The rank whose clock is the common one.
    clock : callable
        Seconds, from any start.
    num_pings : int
        Round trips of each rank.
    """
    # Even where ranks outnumber cores: the error is half a round trip, and a sleep in it would be most of it. The
    # spinning ends by itself after a moment, so that ranks that wait for their turn sleep.
    patience = Patience(awake=True)
    mine, theirs = np.zeros(1), np.zeros(1)
    if comm.rank == root:
        for peer in range(comm.size):
            for _ in range(num_pings if peer != root else 0):
                wait(comm.Irecv(theirs, peer, TAG).Test, patience)
                mine[0] = clock()
                wait(comm.Isend(mine, peer, TAG).Test, patience)
        return 0.0
    pings = []
    for _ in range(num_pings):
        answer = comm.Irecv(theirs, root, TAG)
        sent_s = clock()
        question = comm.Isend(mine, root, TAG)
        wait(answer.Test, patience)
        returned_s = clock()
        wait(question.Test, patience)
        pings.append(Ping(sent_s, float(theirs[0]), returned_s))
    return best_offset(pings)


def best_offset(pings: Iterable[Ping]) -> float:
    """Return the seconds from this rank's clock to the root's, by the ping that returned first.

    A root that answered while the ping was under way by *this* rank's clock too is taken to have the same clock, as
    the ranks of a node do: no measurement is better than that.
    """
    fastest = min(pings, key=lambda ping: ping.returned_s - ping.sent_s)
    if fastest.sent_s <= fastest.root_s <= fastest.returned_s:
        return 0.0
    return fastest.root_s - 0.5 * (fastest.sent_s + fastest.returned_s)
