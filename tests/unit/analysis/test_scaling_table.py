"""The table of a study: what each run measured, and what repeats amount to."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from pathlib import Path

import pytest

from hpcnn.analysis.confidence import Estimate
from hpcnn.analysis.scaling import Study, prepare
from hpcnn.analysis.scaling_point import FAILURE, POINTS, Point
from hpcnn.analysis.scaling_table import Row, collect, summarise, write_csv
from hpcnn.errors import DataError
from tests.studies import finish

BRIEF = {
    "model", "mode", "plan", "exchange", "algorithm", "ranks", "repeat", "global_batch", "step_s", "compute_s",
    "exposed_comm_s", "images_per_second", "memory_bytes", "bytes_sent", "predicted_step_s", "status",
}  # fmt: skip
POINT = Point(
    model="lenet5", mode="strong", plan="data", exchange="allreduce", algorithm="ring", ranks=1, repeat=1,
    global_batch=64,
)  # fmt: skip


def row(step_s: float, **changes) -> Row:
    """Return a finished row of one step time."""
    point = dataclasses.asdict(dataclasses.replace(POINT, **changes))
    return Row(
        **point, step_s=step_s, compute_s=0.5 * step_s, exposed_comm_s=0.25 * step_s, input_wait_s=0.0,
        images_per_second=point["global_batch"] / step_s, memory_bytes=100 + point["ranks"], bytes_sent=8.0,
        status="finished",
    )  # fmt: skip


def test_a_row_has_the_medians_of_the_settled_steps_and_says_what_is_missing(tmp_path: Path) -> None:
    study = Study(source="lenet5", ranks=(1, 2), algorithms=("ring", "butterfly"), repeats=1, steps=6)
    points = prepare(study, tmp_path)
    finish(tmp_path, points[1], [50.0, 60.0, 0.1, 0.4, 0.2, 0.3])  # warm-up, then the median of four
    (tmp_path / POINTS / points[2].name / FAILURE).write_text("exit status 1: out of memory, or so\n")
    write_csv(collect(tmp_path), tmp_path / "scaling.csv")
    with (tmp_path / "scaling.csv").open(newline="") as file:
        rows = {f"{line['algorithm']}-{line['ranks']}": line for line in csv.DictReader(file)}
    assert set(rows["ring-2"]) >= BRIEF
    measured = rows["ring-2"]
    settled = statistics.median([0.1, 0.4, 0.2, 0.3])
    assert pytest.approx(settled) == float(measured["step_s"])
    assert pytest.approx(0.75 * settled) == float(measured["compute_s"])
    assert pytest.approx(0.2 * settled) == float(measured["exposed_comm_s"])
    assert pytest.approx(64 / settled) == float(measured["images_per_second"])
    assert ("100000002", "1000") == (measured["memory_bytes"], measured["bytes_sent"].removesuffix(".0"))
    assert ("finished", "", "") == (measured["status"], measured["reason"], measured["predicted_step_s"])
    failed, pending = rows["butterfly-2"], rows["auto-1"]
    assert ("failed", "exit status 1: out of memory, or so", "") == (
        failed["status"], failed["reason"], failed["step_s"],
    )  # fmt: skip
    assert "pending" == pending["status"]


def test_a_folder_without_a_study_is_told_from_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no study"):
        collect(tmp_path)


def test_speedup_is_over_the_fastest_on_the_fewest_ranks() -> None:
    rows = [
        row(8.0), row(6.0, algorithm="mpi"), row(10.0, algorithm="mpi", repeat=2),  # 8 in the mean: the first stays
        row(4.0, ranks=2), row(2.0, ranks=4), row(2.5, ranks=4, algorithm="mpi"),
    ]  # fmt: skip
    found = {(one.algorithm, one.ranks): one for one in summarise(rows, "strong")}
    assert ("ring", 1) == next(iter(found))
    speedups = {key: one.speedup.value for key, one in found.items()}
    assert {("ring", 1): 1.0, ("mpi", 1): 1.0, ("ring", 2): 2.0, ("ring", 4): 4.0, ("mpi", 4): 3.2} == speedups
    assert Estimate(0.8, None) == found["mpi", 4].efficiency
    assert (2, 104, 8.0) == (found["mpi", 1].repeats, found["ring", 4].memory_bytes, found["ring", 4].bytes_sent)
    assert (1.0, 0.5) == (found["ring", 4].compute_s, found["ring", 4].exposed_comm_s)
    assert [] == summarise(rows, "weak")


def test_a_study_without_a_run_on_one_rank_counts_the_ranks_of_its_base() -> None:
    two, four = summarise([row(4.0, ranks=2), row(2.5, ranks=4)], "strong")
    assert (2.0, 1.0) == (two.speedup.value, two.efficiency.value)
    assert pytest.approx((3.2, 0.8)) == (four.speedup.value, four.efficiency.value)


def test_weak_scaling_is_by_images_a_second() -> None:
    weak = {"mode": "weak"}
    _, four = summarise([row(2.0, **weak), row(2.5, ranks=4, global_batch=256, **weak)], "weak")
    assert pytest.approx((3.2, 0.8, 256 / 2.5)) == (
        four.speedup.value, four.efficiency.value, four.images_per_second,
    )  # fmt: skip


def test_intervals_come_from_the_repeats_on_both_sides() -> None:
    rows = [row(seconds, repeat=n) for n, seconds in enumerate((7.9, 8.0, 8.1), 1)]
    rows += [row(seconds, repeat=n, ranks=2) for n, seconds in enumerate((3.9, 4.0, 4.1), 1)]
    one, two = summarise(rows, "strong")
    assert Estimate(1.0, None) == one.speedup  # over itself
    assert pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-4) == two.step_s.half_width
    # Relative variances (0.1 / 8)^2 / 3 and (0.1 / 4)^2 / 3 make 2.94 degrees of freedom by Welch and Satterthwaite: 2.
    relative = ((0.1 / 8) ** 2 / 3 + (0.1 / 4) ** 2 / 3) ** 0.5
    assert pytest.approx(2.0 * 4.302653 * relative, rel=1e-4) == two.speedup.half_width
    assert pytest.approx(two.speedup.half_width / 2) == two.efficiency.half_width


def test_the_predicted_speedup_is_one_predicted_step_over_another() -> None:
    rows = [row(8.0, predicted_step_s=6.0), row(4.0, ranks=2, predicted_step_s=4.0), row(3.0, ranks=4)]
    one, two, four = summarise(rows, "strong")
    assert (1.0, 1.5, None) == (one.predicted_speedup, two.predicted_speedup, four.predicted_speedup)
