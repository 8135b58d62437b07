"""Who keeps a job from going on: concluded from what the ranks report of their collectives.

Every rank starts the same collectives in the same order and counts its starts. A rank that waits in a collective which
others have started less often waits for these. They may have an excuse: they wait themselves, in another collective.
Whoever is waited for and has none is to blame.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TypeAlias

MOST_HOSTS = 4
"""Ranks named together with their hosts; of more, the numbers alone."""


@dataclass(frozen=True)
class Waiting:
    """A collective that a rank has started and that is not done.

    Attributes
    ----------
    index : int
        Which one, among those of its source.
    label : str
        What it is for, such as "sum of conv4 .. conv5".
    start : int
        Which of its starts this is; the first is 1.
    seconds : float
        How long it has been in flight.
    detail : str
        What exactly is missing, such as "messages from rank 2"; may be empty.
    """

    index: int
    label: str
    start: int
    seconds: float
    detail: str = ""


Key: TypeAlias = tuple[str, int, int]
"""A start of a collective: source, index, number of the start."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank tells the others.

    Attributes
    ----------
    starts : dict of str to tuple of int
        For each source, how many times each of its collectives has been started.
    waiting : dict of str to Waiting
        For each source that waits, what it waits in.
    alarmed : bool
        Whether this rank has waited for too long, and may speak for all.
    members : dict of str to tuple of int
        For each source that waits and is not of all ranks, whose it is.
    """

    starts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    waiting: Mapping[str, Waiting] = field(default_factory=dict)
    alarmed: bool = False
    members: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def has_joined(self, key: Key) -> bool:
        """Return whether the rank has begun this start of a collective."""
        source, index, start = key
        counts = self.starts.get(source, ())
        return index < len(counts) and counts[index] >= start

    def waits(self) -> list[Key]:
        """Return what the rank waits in."""
        return [(source, one.index, one.start) for source, one in self.waiting.items()]

    def encode(self) -> bytes:
        """Return the report as a message."""
        return json.dumps(asdict(self), default=int).encode()

    @classmethod
    def decode(cls, message: bytes) -> Report:
        """Return the report in a message."""
        fields = json.loads(message)
        waiting = {source: Waiting(**one) for source, one in fields["waiting"].items()}
        return cls(starts=fields["starts"], waiting=waiting, alarmed=fields["alarmed"], members=fields["members"])


def conclude(rank: int, reports: Mapping[int, Report], hostnames: Sequence[str], doing: str = "") -> str:
    """Return the line that tells why the job stands still.

    Parameters
    ----------
    rank : int
        The rank that speaks; its report is among the others, and it waits.
    reports : dict of int to Report
        By rank; those that have told nothing are absent.
    hostnames : sequence of str
        The node of every rank.
    doing : str
        What the job was at, such as "step 17"; may be empty.
    """
    at = f" at {doing}" if doing else ""
    waits, missing = _missing(reports, hostnames)
    key, culprits = _blame(waits, missing)
    if key is not None:
        return _absent(key, culprits, waits[key], reports, hostnames, at)
    if missing:
        return _circle([(waits[key], _waiting(key, waits[key][0], reports)) for key in sorted(missing)], at)
    return _not_delivered(rank, waits, reports, at)


def absent(reports: Mapping[int, Report], hostnames: Sequence[str]) -> list[int]:
    """Return the ranks that are waited for and wait for nobody, in the earliest of such collectives."""
    return _blame(*_missing(reports, hostnames))[1]


def _missing(
    reports: Mapping[int, Report], hostnames: Sequence[str]
) -> tuple[dict[Key, list[int]], dict[Key, list[int]]]:
    """Return who waits in what, and who has not joined that; without what all have joined."""
    waits: dict[Key, list[int]] = defaultdict(list)
    for peer in sorted(reports):
        for key in reports[peer].waits():
            waits[key].append(peer)
    missing = {
        key: [peer for peer in _members(key, reports[peers[0]], hostnames) if not _has_joined(peer, key, reports)]
        for key, peers in waits.items()
    }
    return waits, {key: peers for key, peers in missing.items() if peers}


def _blame(waits: Mapping[Key, list[int]], missing: Mapping[Key, list[int]]) -> tuple[Key | None, list[int]]:
    """Return what the ranks to blame have not joined, and these; None and nobody if all of them are excused."""
    excused = {peer for key in missing for peer in waits[key]}
    blamed = {key: sorted(set(peers) - excused) for key, peers in missing.items()}
    blamed = {key: culprits for key, culprits in blamed.items() if culprits}
    if not blamed:
        return None, []
    # Of several collectives the earliest: the one that the fewest ranks have yet to join.
    key = min(blamed, key=lambda key: (len(missing[key]), -len(waits[key]), key))
    return key, blamed[key]


def _members(key: Key, report: Report, hostnames: Sequence[str]) -> Sequence[int]:
    """Return who is to join a collective, by the report of one who waits in it."""
    return report.members.get(key[0], range(len(hostnames)))


def _has_joined(peer: int, key: Key, reports: Mapping[int, Report]) -> bool:
    return peer in reports and reports[peer].has_joined(key)


def _absent(
    key: Key,
    culprits: Sequence[int],
    waiters: Sequence[int],
    reports: Mapping[int, Report],
    hostnames: Sequence[str],
    at: str,
) -> str:
    longest = max((_waiting(key, peer, reports) for peer in waiters), key=lambda one: one.seconds)
    wait = "waits" if len(waiters) == 1 else "wait"
    have = "has" if len(culprits) == 1 else "have"
    were = "was" if len(culprits) == 1 else "were"
    then = f" while others were{at}" if at else ""  # who waits may be a step ahead
    return (
        f"{name_ranks(culprits, hostnames)} {have} not joined '{longest.label}' for {longest.seconds:.0f} s, in which"
        f" {name_ranks(waiters)} {wait}; the job is ended. Look for what {name_ranks(culprits)} {were} doing{then}."
    )


def _circle(groups: Sequence[tuple[Sequence[int], Waiting]], at: str) -> str:
    """Every rank that is waited for waits itself: the ranks have lost their common order."""
    places = ", ".join(f"{name_ranks(waiters)} in '{one.label}'" for waiters, one in groups)
    seconds = max(one.seconds for _, one in groups)
    return (
        f"ranks wait for each other for {seconds:.0f} s{at}: {places}; all ranks must start the same collectives in"
        " the same order. The job is ended. Look for a decision that differs between these ranks."
    )


def _not_delivered(rank: int, waits: Mapping[Key, Sequence[int]], reports: Mapping[int, Report], at: str) -> str:
    """Every rank has joined what any rank waits in."""
    key = max(reports[rank].waits(), key=lambda key: reports[rank].waiting[key[0]].seconds)
    mine = reports[rank].waiting[key[0]]
    labels: dict[str, list[int]] = defaultdict(list)
    for peer in waits[key]:
        labels[_waiting(key, peer, reports).label].append(peer)
    if len(labels) > 1:
        return _circle([(peers, replace(mine, label=label)) for label, peers in labels.items()], at)
    detail = f": rank {rank} waits for {mine.detail}" if mine.detail else f" to rank {rank}"
    return (
        f"messages do not get through{detail}; all ranks have joined '{mine.label}', which has not ended for"
        f" {mine.seconds:.0f} s{at}. The job is ended. Look for errors of the network or the MPI library."
    )


def _waiting(key: Key, peer: int, reports: Mapping[int, Report]) -> Waiting:
    return reports[peer].waiting[key[0]]


def name_ranks(ranks: Sequence[int], hostnames: Sequence[str] | None = None) -> str:
    """Return "rank 2", "ranks 0, 1, 3" or "ranks 0-5, 7", with the hosts of a few if they are given.

    Parameters
    ----------
    ranks : sequence of int
        Not empty, ascending.
    hostnames : sequence of str, optional
        The node of every rank.
    """
    word = "rank" if len(ranks) == 1 else "ranks"
    if hostnames is not None and len(ranks) <= MOST_HOSTS:
        return f"{word} " + ", ".join(f"{rank} (host {hostnames[rank]})" for rank in ranks)
    # Runs of three or more are written as first-last.
    cuts = [0, *(i for i, (left, right) in enumerate(pairwise(ranks), 1) if right != left + 1), len(ranks)]
    parts: list[str] = []
    for start, stop in pairwise(cuts):
        run = [str(rank) for rank in ranks[start:stop]]
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else run
    return f"{word} " + ", ".join(parts)
