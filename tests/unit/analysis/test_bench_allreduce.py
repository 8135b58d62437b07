"""The table of all-reduce times. One rank suffices: it is about the rows, not the times."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hpcnn.analysis.bench_allreduce import ALGORITHMS, AllreduceTime, bench_allreduce, format_table


def test_every_algorithm_is_timed_at_every_size():
    comm = pytest.importorskip("hpcnn.comm")
    rows = bench_allreduce(comm.start(), sizes=(4, 4096), repeats=3)
    assert [(size, name) for size in (4, 4096) for name in ALGORITHMS] == [(r.num_bytes, r.algorithm) for r in rows]
    for row in rows:
        assert 3 == row.repeats
        assert 0 < row.fastest_s <= row.median_s
        assert row.num_bytes / row.median_s == pytest.approx(row.bytes_per_s)
        assert row.as_json() == json.loads(json.dumps(row.as_json()))
    assert [4, 4096] == [row.num_bytes for row in rows if row.chosen]


def test_the_table_has_a_line_a_size_and_marks_what_auto_takes():
    row = AllreduceTime(
        num_ranks=4, num_bytes=4 << 20, algorithm="ring", repeats=5, median_s=2e-3, fastest_s=1e-3,
        bytes_per_s=2.1e9, chosen=True,
    )  # fmt: skip
    other = replace(row, algorithm="mpi", chosen=False)
    table = format_table([row, other, replace(row, num_bytes=4), replace(other, num_bytes=4)])
    lines = table.splitlines()
    assert "over 4 ranks" in lines[0]
    assert ["size", "ring", "mpi"] == lines[1].split()
    assert ["4", "MiB", "2000.0", "us", "2.10", "GB/s*", "2000.0", "us", "2.10", "GB/s"] == lines[2].split()
    assert "4 B" in lines[3]
    assert "no measurements" == format_table([])
