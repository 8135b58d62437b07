"""Limits, names and clocks of nodes that this machine is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcnn.cli.checks import limits

FINE = {
    "locked_memory_bytes": 8 << 20, "open_files": 1024, "address_space_bytes": None, "infiniband": [],
    "memory_limit_bytes": None, "memory_used_bytes": 0, "memory_available_bytes": 64 << 30,
}  # fmt: skip


def test_facts_of_this_machine_are_judged(tmp_path: Path) -> None:
    found = limits.facts()
    assert set(FINE) == set(found)
    assert found["memory_available_bytes"] > 0
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    assert limits.facts(tmp_path)["infiniband"] == ["mlx5_0"]


@pytest.mark.parametrize(
    ("change", "ranks", "what", "fix"),
    [
        ({"infiniband": ["mlx5_0"]}, 1, "8.39 MB of memory may be locked", "ulimit -l unlimited"),
        ({}, 512, "1024 open files are allowed (ulimit -n), 512 ranks may need 1280", "ulimit -n 1280"),
        ({"address_space_bytes": 1 << 30}, 1, "may map 1.07 GB (ulimit -v)", "ulimit -v unlimited"),
        ({"memory_available_bytes": 1 << 29}, 1, "537 MB of memory left for 1 rank", "--mem"),
        (
            {"memory_limit_bytes": 4 << 30, "memory_used_bytes": 1 << 30}, 8,
            "3.22 GB of memory of the control group left for 8 ranks", "fewer ranks",
        ),
    ],
)  # fmt: skip
def test_limits_that_end_jobs(change: dict, ranks: int, what: str, fix: str) -> None:
    (problem,) = limits.judge("a", FINE | change, local_size=min(ranks, 8), num_ranks=ranks)
    assert problem.what.startswith("a: ")
    assert what in problem.what
    assert fix in problem.fix


def test_limits_that_do_not_matter_here() -> None:
    assert limits.judge("a", FINE, local_size=8, num_ranks=8) == []
    assert limits.judge("a", {}) == []
    assert limits.judge("a", FINE | {"infiniband": ["mlx5_0"], "locked_memory_bytes": None}) == []


def test_names_that_lead_nowhere() -> None:
    a, b, lost = ({"name": name, "address": ip} for name, ip in (("a", "10.0.0.1"), ("b", "127.0.1.1"), ("c", None)))
    assert limits.judge_names([a]) == limits.judge_names([b]) == []
    (problem,) = limits.judge_names([a, b])
    assert problem.what.endswith("loopback address: b")
    (problem,) = limits.judge_names([a, lost])
    assert problem.what == "host names without an address: c"


def test_clocks_that_disagree() -> None:
    assert limits.judge_clocks(["a", "b"], [100.0, 101.5]) == []
    (problem,) = limits.judge_clocks(["a", "b", "c"], [100.0, 90.0, 100.1])
    assert problem.what == "clocks are 10.1 s apart: b is behind c"
