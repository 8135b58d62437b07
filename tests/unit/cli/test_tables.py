"""What `hpcnn bench allreduce` and `hpcnn profile` print."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcnn.analysis.bench_allreduce import AllreduceTime, summarise
from hpcnn.cli.bench import _allreduce_table, _summary_line, milliseconds
from hpcnn.cli.profile import describe
from hpcnn.plan.machine import Link, Machine, Measured

RING = AllreduceTime(
    num_ranks=4, num_bytes=4 << 20, algorithm="ring", runs="ring", repeats=5, times_s=(2e-3,) * 5, median_s=2e-3,
    fastest_s=1e-3, bytes_per_s=2.1e9, predicted_s=1.9e-3,
)  # fmt: skip
MPI = replace(RING, algorithm="mpi", runs="mpi", predicted_s=None, median_s=4e-3)
AUTO = replace(RING, algorithm="auto")


def test_the_table_has_a_line_a_size_predictions_beside_and_what_auto_took():
    lines = _allreduce_table([RING, MPI, AUTO, *(replace(row, num_bytes=4) for row in (RING, MPI, AUTO))]).splitlines()
    assert "over 4 ranks" in lines[0]
    assert ["size", "turns", "ring", "predicted", "mpi", "auto"] == lines[1].split()
    assert ["4", "MiB", "5", "2.00", "1.90", "4.00", "2.00", "ring"] == lines[3].split()
    assert ["4", "B", "5"] == lines[4].split()[:3]
    assert "no measurements" == _allreduce_table([])


def test_the_line_below_tells_how_good_choice_and_predictions_were():
    line = _summary_line(summarise([RING, MPI, AUTO]))
    assert "1.00 times the best of ours (4 MiB)" in line
    assert "0.50 times the library's own (4 MiB)" in line
    assert "5% in the median, 5% at most (ring at 4 MiB)" in line
    assert "library" not in _summary_line(summarise([RING, AUTO]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.37e-6, "0.0084"), (0.12345e-3, "0.1234"), (1.234e-3, "1.23"), (0.0456, "45.6"), (7.0, "7000")],
)
def test_milliseconds_keep_three_digits(seconds, text):
    assert text == milliseconds(seconds)


def test_a_measured_machine_is_told_with_what_was_not_measured():
    link = Link(alpha_s=1e-6, beta_s_per_byte=5e-10, sizes=(4, 8), copy_s=(1e-6, 2e-6), sum_s=(3e-6, 4e-6))
    machine = Machine(node=link, measured=Measured(hosts=1, ranks=2, cores=4, mpi="MPICH 5.0.2"))
    text = describe(machine)
    assert "2 ranks on 1 hosts, 4 cores for each, MPICH 5.0.2" in text
    assert "node: about 1.0 us a message and 2 GB/s each way" in text
    assert "network: not measured (a single host)" in text
    assert ["8", "2.0", "4.0", "1.0"] == text.splitlines()[-1].split()
    other = describe(replace(machine, node=None, network=replace(link, beta_s_per_byte=0.0)))
    assert "node: not measured (one rank a host)" in other
    assert "no measurable limit" in other


def test_links_measured_up_to_different_lengths_share_a_table():
    link = Link(alpha_s=1e-6, beta_s_per_byte=1e-9, sizes=(4, 8), copy_s=(1e-6, 2e-6), sum_s=(3e-6, 4e-6))
    short = replace(link, sizes=(4,), copy_s=(5e-6,), sum_s=(6e-6,))
    last = describe(Machine(node=link, network=short)).splitlines()[-1]
    assert ["8", "2.0", "4.0", "1.0", "-", "-", "-"] == last.split()
