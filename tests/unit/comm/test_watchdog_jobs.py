"""Jobs that stand still: each must end soon, with a non-zero code and one line that names the right rank."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.launch import Result, launch, reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

TIMEOUT_S = 2.0
LONGEST_S = 2 * TIMEOUT_S + 10  # timeout, grace, and the start of Python and MPI on a busy machine

DRIVER = """
import os, signal, sys, threading, time
import numpy as np
from hpcnn.comm import run_and_exit, start
from hpcnn.comm.verdict import Waiting
from hpcnn.errors import DataError

LABELS = ["sum of fc8", "sum of conv4 .. conv5"]


class Sums:
    \"\"\"Two all-reduces, started as often as one likes, and carried on by a thread.\"\"\"

    def __init__(self, world, *, watched_when_idle):
        self.comms = [world.comm.Dup() for _ in LABELS]
        self.starts = [0, 0]
        self.flight = None
        self.watchdog, self.idle = world.watchdog, watched_when_idle
        self.watchdog.add_source("sums", lambda: self.starts)
        threading.Thread(target=self.work, daemon=True).start()

    def work(self):
        while True:
            flight = self.flight
            if flight is not None:
                index, request, begin = flight
                if request.Test():
                    self.flight = None
                else:
                    waiting = Waiting(index, LABELS[index], self.starts[index], time.monotonic() - begin)
                    self.watchdog.check("sums", waiting)
            elif self.idle:
                self.watchdog.check("sums", None)
            time.sleep(0.005)

    def run(self, index):
        self.starts[index] += 1
        self.data = np.ones(2, np.float32), np.ones(2, np.float32)
        self.flight = index, self.comms[index].Iallreduce(*self.data), time.monotonic()
        while self.flight:
            time.sleep(0.005)
        return 0


def main():
    world = start()
    world.watchdog.timeout_s = float(sys.argv[1])
    sums = Sums(world, watched_when_idle=WATCHED_WHEN_IDLE)
    for step in range(1, 4):
        world.watchdog.doing = f"step {step}"
        sums.run(0)
        sums.run(1)
BODY
    return 0

sys.exit(run_and_exit(main))
"""


class Job(NamedTuple):
    """What a job does after three good steps of two sums."""

    n: int
    body: str
    watched_when_idle: bool = False
    timeout_s: float = TIMEOUT_S


JOBS = {
    "hangs": Job(4, "if world.rank == 2: time.sleep(100)\nsums.run(1)"),
    "hangs, its thread does not": Job(3, "if world.rank == 0: time.sleep(100)\nsums.run(1)", watched_when_idle=True),
    "stopped": Job(3, "if world.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\nsums.run(0)", watched_when_idle=True),
    # Rank 3 waits for rank 2 in the first sum; ranks 0 and 1, which pretend to have done it, wait for both in the next.
    "earlier": Job(
        4, "if world.rank == 2: time.sleep(100)\nif world.rank == 3: sums.run(0)\nsums.starts[0] = 4\nsums.run(1)"
    ),
    "disorder": Job(4, "sums.run(int(world.rank == 3))"),
    "agrees instead": Job(3, "if world.rank == 1: world.agree()\nsums.run(0)"),
    "ends": Job(3, "if world.rank == 2: return 0\nsums.run(0)"),
    "does not agree": Job(3, "if world.rank == 1: time.sleep(100)\nworld.agree()"),
    "lost message": Job(
        3,
        """
sums.starts[0] += 1
request, begin, left = world.comm.Irecv(np.empty(1), (world.rank + 1) % 3, 99), time.monotonic(), (world.rank + 1) % 3
while not request.Test():
    world.watchdog.check("sums", Waiting(0, LABELS[0], 4, time.monotonic() - begin, f"messages from rank {left}"))
    time.sleep(0.01)""",
    ),
    "late": Job(
        3,
        f"if world.rank == 1: time.sleep({1.5 * TIMEOUT_S})\nfor _ in range(3):\n    sums.run(0)\nworld.agree()",
        watched_when_idle=True,
    ),
    "off": Job(3, "if world.rank == 1: time.sleep(3)\nsums.run(0)", timeout_s=0.0),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Iterator[Mapping[str, Future[Result]]]:
    """Run all jobs, several at a time: they do little but wait."""
    folder = tmp_path_factory.mktemp("jobs")
    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(run_job, folder / f"{i}.py", job) for i, (name, job) in enumerate(JOBS.items())}


def run_job(script: Path, job: Job) -> Result:
    body = textwrap.indent(job.body, "    ")
    script.write_text(DRIVER.replace("BODY", body).replace("WATCHED_WHEN_IDLE", str(job.watched_when_idle)))
    return launch(job.n, script, [str(job.timeout_s)], timeout=60)


def the_line(result: Result) -> str:
    """Return the one line of the job, without its host."""
    assert result.returncode != 0
    assert 1 == len(result.errors), result.stderr
    assert "Traceback" not in result.stderr
    assert TIMEOUT_S < result.seconds < LONGEST_S
    return re.sub(r"\(host [^)]+\)", "(host H)", result.errors[0])


@pytest.mark.parametrize(
    ("name", "culprit", "waiters"),
    [("hangs", 2, "ranks 0, 1, 3 wait"), ("hangs, its thread does not", 0, "ranks 1, 2 wait")],
)
def test_a_rank_that_hangs_in_its_computation_is_named(jobs, name, culprit, waiters):
    assert re.fullmatch(
        rf"hpcnn: error: rank {culprit} \(host H\) has not joined 'sum of conv4 .. conv5' for \d s, in which {waiters};"
        rf" the job is ended. Look for what rank {culprit} was doing while others were at step 3.",
        the_line(jobs[name].result()),
    )


def test_a_stopped_process_is_named_and_ended(jobs):
    line = the_line(jobs["stopped"].result())
    assert line.startswith("hpcnn: error: rank 1 (host H) has not joined 'sum of fc8' for")
    assert "in which ranks 0, 2 wait" in line


def test_the_earlier_of_two_collectives_that_others_wait_in_is_blamed(jobs):
    line = the_line(jobs["earlier"].result())
    assert line.startswith("hpcnn: error: rank 2 (host H) has not joined 'sum of fc8' for")
    assert "in which rank 3 waits" in line


def test_ranks_that_start_collectives_in_different_orders_are_told_so(jobs):
    line = the_line(jobs["disorder"].result())
    assert "ranks wait for each other" in line
    assert "ranks 0-2 in 'sum of fc8', rank 3 in 'sum of conv4 .. conv5'; all ranks must start the same" in line


def test_a_rank_that_goes_to_an_agreement_while_others_sum_has_lost_its_order(jobs):
    line = the_line(jobs["agrees instead"].result())
    assert "rank 1 in 'agreement'" in line
    assert "ranks 0, 2 in 'sum of fc8'" in line


def test_a_rank_that_has_come_to_its_end_is_named(jobs):
    line = the_line(jobs["ends"].result())
    assert line.startswith("hpcnn: error: rank 2 (host H) has not joined 'sum of fc8' for")


def test_a_rank_that_never_comes_to_an_agreement_is_named(jobs):
    line = the_line(jobs["does not agree"].result())
    assert line.startswith("hpcnn: error: rank 1 (host H) has not joined 'agreement' for")


def test_a_message_that_nobody_sends_is_not_blamed_on_a_rank(jobs):
    line = the_line(jobs["lost message"].result())
    assert "messages do not get through: rank 0 waits for messages from rank 1; all ranks have joined" in line


def test_a_rank_that_comes_during_the_grace_ends_the_alarm_and_the_job_goes_on(jobs):
    result = jobs["late"].result()
    assert (0, []) == (result.returncode, result.errors), result.stderr
    assert "abort" not in result.stderr.lower()


def test_without_a_timeout_nothing_is_said(jobs):
    result = jobs["off"].result()
    assert (0, []) == (result.returncode, result.errors)
