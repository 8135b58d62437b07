"""The experiment on the inequalities: numbers of runs, and their table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import experiment_information_plane as script

from hpcnn import configuration
from hpcnn.analysis.plane_file import PlaneFile
from tests.unit.analysis.test_plane_file import setting, values


@pytest.mark.parametrize("kernels", script.KERNELS)
def test_every_way_to_choose_kernels_is_one(kernels: str) -> None:
    configuration.load("information-plane", list(script.KERNELS[kernels]))


def test_the_table_has_means_and_deviations_of_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed, accuracy in ((1, 0.5), (2, 0.7)):
        run = tmp_path / f"maps-silverman-{seed}"
        run.mkdir()
        record = PlaneFile(run, setting(), 0)
        for step in (0, 10):
            record.add(step, 0.5, values())
        record.write()
        (run / "metrics.jsonl").write_text(json.dumps({"event": "end", "test_accuracy": accuracy}) + "\n")
        (run / "final.h5").touch()
    args = script.make_parser().parse_args(
        ["--seeds", "1", "2", "--kernels", "maps, silverman", "--out", str(tmp_path), "--set", "train.steps=10"]
    )
    found = script.measure(args)
    # I_x is 2, 1.3, 0.9 and what errors share with the last is 0.8, 1: neither inequality fails.
    np.testing.assert_allclose(found["maps, silverman"][0], [0, 0, 0, 0, 2.0, 0.9, 0.8, 0, 0.5, 0.5], atol=1e-9)
    table = script.report(args, found)
    assert "0.6 ± 0.14" in table
    assert "seeds 1, 2" in table
    assert "train.steps=10" in table
    assert "maps, silverman 2" in capsys.readouterr().out
