"""What ranks tell of themselves, and a start that takes too long."""

from __future__ import annotations

import subprocess
import sys

from hpcnn.cli.checks import ranks
from tests.launch import environment


def one(number: int, host: str, **versions: str) -> dict:
    return {"rank": number, "host": host, "versions": {"hpcnn": "1", "NumPy": "2"} | versions}


def test_ranks_of_another_installation_are_found() -> None:
    assert ranks.unlike([one(0, "a"), one(1, "b")]) == []
    (problem,) = ranks.unlike([one(0, "a"), one(1, "b", NumPy="1")])
    assert problem.what == "rank 1 on b has NumPy 1, rank 0 2"
    assert not problem.essential
    (problem,) = ranks.unlike([one(0, "a"), one(1, "b", hpcnn="0.9")])
    assert problem.essential


HOLD = """
import time
from hpcnn.cli.checks.ranks import starting_within
with starting_within({0}, 0):
    time.sleep({1})
print("went on")
"""


def hold(limit: float, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HOLD.format(limit, seconds)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment(),
    )


def test_a_start_that_takes_too_long_is_one_line_and_the_end() -> None:
    done = hold(0.2, 30.0)
    assert done.returncode == -9
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "MPI did not connect the ranks within" in done.stderr


def test_a_start_in_time_goes_on() -> None:
    done = hold(30.0, 0.0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
