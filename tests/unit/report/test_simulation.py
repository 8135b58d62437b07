"""The table and the picture of a simulation, read back."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from hpcnn import configuration
from hpcnn.analysis.forecast import model_of
from hpcnn.errors import DataError
from hpcnn.plan.machine import load
from hpcnn.plan.simulation import Series, simulate
from hpcnn.report.simulation import COLUMNS, plot_simulation, write_csv


def test_every_point_is_a_row_and_published_points_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = configuration.load("lenet5", ["train.global_batch=64"])
    series = [Series("data", "allreduce", "ring"), Series("data", "sharded", "pairwise")]
    done = {"lenet5": simulate(config, model_of(config), load("cpu-100g"), [1, 64], series)}
    write_csv(done, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row[2], row[4]) for row in rows[1:]] == [
        (kind, ranks) for ranks in ("1", "64") for kind in ("allreduce", "sharded")
    ]
    plot_simulation(done, [tmp_path / "picture.svg"], "title", {"lenet5": (1536, 99.0)})
    assert "published" not in (tmp_path / "table.csv").read_text()
    assert (tmp_path / "picture.svg").stat().st_size > 10_000


def test_files_that_cannot_be_written_are_one_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = configuration.load("lenet5", ["train.global_batch=64"])
    done = {"lenet5": simulate(config, model_of(config), load("cpu-100g"), [2], [Series("data", "allreduce", "ring")])}
    with pytest.raises(DataError, match="cannot write"):
        write_csv(done, tmp_path / "no" / "table.csv")
    with pytest.raises(DataError, match="cannot write"):
        plot_simulation(done, [tmp_path / "picture.nonsense"])
