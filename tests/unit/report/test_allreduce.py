"""The picture of all-reduce times."""

from __future__ import annotations

import importlib.util
import sys
from typing import NamedTuple

import pytest

from hpcnn.errors import DataError
from hpcnn.report.allreduce import plot_allreduce


class Row(NamedTuple):
    algorithm: str
    num_bytes: int
    median_s: float
    predicted_s: float | None
    fastest_s: float = 1e-6
    num_ranks: int = 4


ROWS = [
    Row(name, size, 1e-5 + size * 1e-9, None if name == "mpi" else 2e-5)
    for size in (4, 1024, 1 << 20)
    for name in ("butterfly", "ring", "mpi", "auto")
]

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@needs_matplotlib
@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_picture_is_written_in_the_format_of_its_suffix(tmp_path, name, start):
    plot_allreduce(ROWS, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@needs_matplotlib
def test_the_picture_names_every_algorithm_and_the_predictions(tmp_path):
    plot_allreduce(ROWS, tmp_path / "a.svg", title="four hosts")
    text = (tmp_path / "a.svg").read_text()
    for word in ("butterfly", "ring", "mpi", "auto", "predicted", "four hosts"):
        assert f"<!-- {word} -->" in text


@needs_matplotlib
def test_rows_of_the_librarys_own_alone_can_be_drawn_too(tmp_path):
    plot_allreduce([row for row in ROWS if row.algorithm == "mpi"], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@needs_matplotlib
@pytest.mark.parametrize("name", ["missing/a.png", "a.nonsense"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    with pytest.raises(DataError, match=r"plot: cannot write .*" + name):
        plot_allreduce(ROWS, tmp_path / name)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match=r"hpcnn\[plots\]"):
        plot_allreduce(ROWS, tmp_path / "a.png")
