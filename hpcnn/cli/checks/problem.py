"""Something that is wrong, and what to do about it."""

from __future__ import annotations

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
