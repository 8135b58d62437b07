"""Cores and threads of ranks, on nodes that this machine is not."""

from __future__ import annotations

import pytest

from hpcnn.cli.checks.binding import judge, judge_slurm
from hpcnn.cli.checks.problem import Problem


def rank(number: int, cores: str, threads: int = 1, host: str = "a", **more: object) -> dict:
    return {"rank": number, "host": host, "cores": cores, "threads": threads, **more}


@pytest.mark.parametrize(
    "ranks",
    [
        [rank(0, "0-3", 2), rank(1, "0-3", 2), rank(2, "0-3", 4, "b")],
        [rank(0, "0-1", 2), rank(1, "2-3", 2)],
        [rank(0, "0", 1), rank(1, "0-3", 3)],
        [rank(0, "0-15,32-47", 32, node_cores=48)],
        [rank(0, "0-3", 2, quotas={"g": 3.5}), rank(1, "0-3", 2, quotas={"g": 3.5})],
    ],
)
def test_ranks_with_cores_enough_are_fine(ranks: list[dict]) -> None:
    assert judge(ranks) == []


def test_ranks_that_want_more_threads_than_cores_are_reported_by_host() -> None:
    ranks = [rank(0, "0-3", 2), rank(1, "0-3", 2), rank(2, "0-3", 2, "b"), rank(3, "0-3", 4, "b")]
    (problem,) = judge(ranks)
    assert problem == Problem("b: 2 ranks with 6 threads together on 4 cores", "Set OMP_NUM_THREADS=2.", False)
    (problem,) = judge([rank(number, "0-1") for number in range(3)])
    assert problem == Problem("a: 3 ranks with 3 threads together on 2 cores", "Start at most 2 ranks there.", False)


@pytest.mark.parametrize(
    ("ranks", "what", "fix"),
    [
        ([rank(0, "0", 4), rank(1, "1", 4)], "rank 0 is bound to core 0 and runs 4 threads", "OMP_NUM_THREADS=1"),
        ([rank(0, "0-1", 4)], "rank 0 is bound to cores 0-1 and runs 4 threads", "--cpus-per-task=4"),
        ([rank(0, "0"), rank(1, "0"), rank(2, "1-3", 2)], "ranks 0, 1 share core 0", "--bind-to none"),
        (
            [rank(0, "0-3", 3, quotas={"g": 2.5}), rank(1, "4-7", 3, quotas={"g": 2.5})],
            "grants 2.5 cores' time to 2 ranks with 6 threads",
            "OMP_NUM_THREADS=1",
        ),
        ([rank(0, "0", node_cores=64), rank(1, "1", node_cores=64)], "may run on 2 of 64 cores", "slot:PE=32"),
    ],
)
def test_bindings_that_cost_time(ranks: list[dict], what: str, fix: str) -> None:
    (problem,) = judge(ranks)
    assert problem.what.startswith("a: ")
    assert what in problem.what
    assert fix in problem.fix
    assert not problem.essential


def test_cores_that_srun_did_not_inherit() -> None:
    ranks, variables = [rank(0, "0-7"), rank(1, "8")], {"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "8"}
    (problem,) = judge_slurm(ranks, variables)
    assert problem.what == "rank 1 on a has 1 cores, --cpus-per-task asks for 8"
    assert judge_slurm(ranks[:1], variables) == []
    assert judge_slurm(ranks, {"SLURM_CPUS_PER_TASK": "8"}) == []  # mpirun in a batch script
