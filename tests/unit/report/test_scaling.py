"""The picture of a scaling study."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from hpcnn.report.scaling import _lines, plot_scaling


class Value(NamedTuple):
    value: float
    half_width: float | None


class Row(NamedTuple):
    contender: str
    ranks: int
    step_s: Value
    speedup: Value
    predicted_speedup: float | None = None
    compute_s: float = 0.5
    exposed_comm_s: float = 0.1

    @property
    def efficiency(self) -> Value:
        return Value(self.speedup.value / self.ranks, None)


def row(contender: str, ranks: int, predicted: float | None = None) -> Row:
    return Row(contender, ranks, Value(1 / ranks, 0.1), Value(0.9 * ranks, 3.0 if ranks > 1 else None), predicted)


SERIAL = row("serial", 1, 1.0)
STUDY = [SERIAL, row("ring", 2, 1.9), row("ring", 4, 3.7), row("mpi", 2)]


def test_a_run_alone_on_the_fewest_ranks_is_where_all_lines_start() -> None:
    assert {"ring": [1, 2, 4], "mpi": [1, 2]} == {k: [one.ranks for one in v] for k, v in _lines(STUDY).items()}
    several = [*STUDY, row("ring", 1)]
    found = {k: [one.ranks for one in v] for k, v in _lines(several).items()}
    assert {"serial": [1], "ring": [1, 2, 4], "mpi": [2]} == found
    assert {"serial": [SERIAL]} == _lines([SERIAL])
    further = [SERIAL, row("serial", 2), row("ring", 2)]
    assert {"serial": [1, 2], "ring": [1, 2]} == {k: [o.ranks for o in v] for k, v in _lines(further).items()}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_picture_is_written_twice_and_names_its_contenders(tmp_path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        svg, png = plot_scaling(STUDY, tmp_path / "scaling-strong", "lenet5, strong scaling")
    assert (tmp_path / "scaling-strong.svg", tmp_path / "scaling-strong.png") == (svg, png)
    assert png.read_bytes().startswith(b"\x89PNG")
    words = re.findall(r">([^<>\n]+)</text>", svg.read_text())
    assert {"ideal", "predicted", "ring", "mpi", "compute", "exposed communication", "ring, 4 ranks"} <= set(words)
    assert {"lenet5, strong scaling", "serial, 1 rank", "speed-up", "efficiency"} <= set(words)
    plot_scaling([SERIAL], tmp_path / "one", "one point only")
