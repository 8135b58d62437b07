"""`hpcnn simulate` from its words to its tables and files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from hpcnn.cli import main as cli
from hpcnn.errors import PlanError

WORDS = ["simulate", "lenet5", "--machine", "cpu-100g", "--set", "train.global_batch=512"]


def test_tables_csv_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = ["--ranks", "4,1,1024,512", "--algorithms", "ring,butterfly", "--breakdown", "512", "--out", str(tmp_path)]
    assert cli.main([*WORDS, *words]) == 0
    out = capsys.readouterr().out
    assert "data, allreduce, ring on 512 ranks" in out
    assert "left out: data, allreduce, ring on 1024 ranks: plan: train.global_batch (=512) is smaller" in out
    with (tmp_path / "simulation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["algorithm"], row["ranks"]) for row in rows] == [
        (name, ranks) for ranks in ("1", "4", "512") for name in ("ring", "butterfly")
    ]
    for row in rows:
        assert float(row["efficiency"]) == pytest.approx(float(row["speed_up"]) / float(row["cores"]), rel=1e-4)
        assert float(row["step_s"]) == pytest.approx(float(row["compute_s"]) + float(row["exposed_s"]), rel=1e-3)
    assert (tmp_path / "simulation.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "simulation.svg").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--ranks", "1,two"], "must be numbers with commas between them"),
        (["--ranks", "0"], "must be at least 1"),
        (["--ranks", ""], "must be at least 1"),
        (["--ranks", "4", "--breakdown", "8"], "must be one of --ranks"),
        (["--ranks", "4", "--plans", "best"], "plan .* is unknown"),
        (["--ranks", "4", "--machine", "no-such-machine"], "cpu-100g"),
    ],
)
def test_words_that_make_no_sense_are_refused(words: list[str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        cli.main([*WORDS, *words])
