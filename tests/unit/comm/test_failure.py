"""What is taken for the death of a rank, and which processes are ended for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcnn.comm.failure import Process, kill_hung


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that sleeps."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def described(pid: int) -> Process:
    """Return another process of this machine as it would describe itself."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return Process(Process.here().place, pid, fields[22 - 3])


def test_a_hung_rank_is_killed_by_those_on_its_node(sleeper):
    assert kill_hung([1], [Process.here(), described(sleeper.pid)])
    assert sleeper.wait(5) == -9


def test_a_process_that_has_taken_over_a_number_is_left_alone(sleeper):
    described(sleeper.pid)._replace(begun="1").kill()
    described(sleeper.pid)._replace(place="another node").kill()
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.2)


def test_a_rank_on_a_node_of_its_own_cannot_be_given_up(sleeper):
    alone = described(sleeper.pid)._replace(place="another node")
    assert not kill_hung([1], [Process.here(), alone])
    assert not kill_hung([1, 2], [Process.here(), alone, alone])  # those two have only each other
    assert not kill_hung([], [Process.here()])
    assert kill_hung([1], [Process.here(), alone, alone._replace(pid=1)])  # its neighbour does it
    assert sleeper.poll() is None


START = """
import sys
import time
from hpcnn.comm import library
library.GRACE_S = 0.2
with library.started_within(float(sys.argv[1])):
    sum(range(10**12)) if sys.argv[2] == "hangs" else time.sleep(0.1)  # without letting other threads in
print("up")
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", ["hangs", "starts"])
def test_a_start_that_takes_for_ever_is_ended_and_rank_0_says_why(rank, way):
    limit = "0.3" if way == "hangs" else "30"
    env = os.environ | {"OMPI_COMM_WORLD_RANK": str(rank), "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", START, limit, way]
    # Whoever holds its end of the pipes is waited for as well: nobody may be left.
    result = subprocess.run(command, env=env, text=True, capture_output=True, timeout=20)
    if way == "starts":
        assert (0, "up\n", "") == (result.returncode, result.stdout, result.stderr)
        return
    assert (1, "") == (result.returncode, result.stdout)
    words = "hpcnn: error: comm: MPI has not started in 0.3 s: a rank was killed meanwhile"
    assert result.stderr.startswith(words) if rank == 0 else result.stderr == ""
