"""Something that is wrong, and what to do about it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from hpcnn.errors import HpcnnError


class Problem(NamedTuple):
    """What is wrong, what to do about it in a line, and whether training cannot work until then."""

    what: str
    fix: str
    essential: bool = True

    @classmethod
    def of(cls, error: HpcnnError) -> Problem:
        """Return an error of ours, whose last sentences say what to do."""
        what, _, fix = str(error).partition(". ")
        return cls(what, fix or "See the message.")


def advice(what: str, fix: str) -> Problem:
    """Return something that training survives."""
    return Problem(what, fix, essential=False)


def merged(problems: Sequence[Problem], hosts: Collection[str]) -> list[Problem]:
    """Return problems that begin with a host's name once for all hosts that have them, whatever their numbers."""

    def key(problem: Problem) -> tuple[str, bool]:
        host, _, rest = problem.what.partition(": ")
        return (re.sub(r"\d+(\.\d+)?", "#", rest) if host in hosts else problem.what), problem.essential

    counts = Counter(map(key, problems))
    first = {key(problem): problem for problem in reversed(problems)}
    return [
        problem
        if counts[key(problem)] == 1
        else problem._replace(what=f"{problem.what} (and {counts[key(problem)] - 1} more hosts like it)")
        for problem in dict.fromkeys(problems)
        if first[key(problem)] is problem
    ]
