"""The rows and the verdict of the all-reduce benchmark. One rank suffices: it is not about the times."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from hpcnn.analysis.bench_allreduce import SIZES, AllreduceTime, bench_allreduce, size_text, summarise
from hpcnn.plan.machine import Machine

OURS = ("butterfly", "halving-doubling", "ring")


def row(num_bytes, name, times, predicted=None, runs=None) -> AllreduceTime:
    times = tuple(times)
    median = sorted(times)[len(times) // 2]
    return AllreduceTime(
        num_ranks=4, num_bytes=num_bytes, algorithm=name, runs=runs or name, repeats=len(times), times_s=times,
        median_s=median, fastest_s=min(times), bytes_per_s=num_bytes / median, predicted_s=predicted,
    )  # fmt: skip


def test_every_algorithm_is_timed_at_every_size():
    comm = pytest.importorskip("hpcnn.comm")
    rows = bench_allreduce(comm.start(), sizes=(4, 4096), repeats=3, machine=Machine(start_s=1.0))
    names = (*OURS, "mpi", "auto")
    assert [(size, name) for size in (4, 4096) for name in names] == [(r.num_bytes, r.algorithm) for r in rows]
    for one in rows:
        assert 3 == one.repeats == len(one.times_s)
        assert 0 < one.fastest_s <= one.median_s
        assert one.num_bytes / one.median_s == pytest.approx(one.bytes_per_s)
        assert one.as_json() | {"times_s": list(one.times_s)} == json.loads(json.dumps(one.as_json()))
        if one.algorithm == "auto":
            assert one.runs in OURS
        else:
            assert one.runs == one.algorithm
        assert (one.predicted_s is None) == (one.algorithm == "mpi")


def test_sizes_reach_from_one_number_to_a_quarter_of_a_gibibyte():
    assert (4, 256 << 20) == (SIZES[0], SIZES[-1])
    assert all(4 * left == right for left, right in pairwise(SIZES))


def test_the_verdict_names_the_worst_size_of_each_kind():
    rows = [
        row(4, "butterfly", [1.0, 1.0, 1.0], predicted=1.1),
        row(4, "ring", [2.0, 2.0, 2.0], predicted=2.0),
        row(4, "mpi", [0.5, 0.5, 0.5]),
        row(4, "auto", [1.0, 1.0, 1.0], runs="butterfly"),
        row(1024, "butterfly", [3.0, 3.0, 3.0], predicted=3.0),
        row(1024, "ring", [2.0, 2.0, 2.0], predicted=5.0),
        row(1024, "mpi", [4.0, 4.0, 4.0]),
        row(1024, "auto", [3.0, 3.0, 3.0], runs="butterfly"),
    ]
    summary = summarise(rows)
    assert (1.5, 1024) == (summary.auto_by_best, summary.auto_by_best_bytes)
    assert (2.0, 4) == (summary.auto_by_mpi, summary.auto_by_mpi_bytes)
    assert (1.5, "ring at 1 KiB") == (summary.max_error, summary.max_error_at)
    assert 0.05 == pytest.approx(summary.median_error)  # of 0, 0, 0.1 and 1.5


def test_auto_and_the_algorithm_it_takes_are_one_sample():
    rows = [
        row(4, "butterfly", [1.0, 1.0, 1.0, 1.0, 1.0], predicted=1.0),
        row(4, "auto", [1.0, 1.2, 1.2], runs="butterfly"),
        row(4, "ring", [1.5], predicted=1.0),
    ]
    summary = summarise(rows)
    assert 1.0 == summary.auto_by_best
    assert summary.auto_by_mpi is None


def test_without_auto_or_algorithms_of_ours_there_is_no_verdict():
    assert summarise([]) is None
    assert summarise([row(4, "ring", [1.0], predicted=1.0)]) is None
    assert summarise([row(4, "mpi", [1.0]), row(4, "auto", [1.0], runs="ring")]) is None


def test_sizes_are_written_as_people_write_them():
    assert ["4 B", "1 KiB", "1.5 KiB", "256 MiB"] == [size_text(n) for n in (4, 1024, 1536, 256 << 20)]
