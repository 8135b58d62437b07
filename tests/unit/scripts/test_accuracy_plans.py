"""What comes out of whole trainings, serial and split, side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.launch import reason_to_skip

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import bench_accuracy_plans as script


def test_losses_are_means_of_epochs_and_scores_those_of_the_end() -> None:
    losses = {1: (4.0, 2.0), 2: (1.0, 0.5)}
    records = [{"event": "step", "epoch": epoch, "loss": loss} for epoch in losses for loss in losses[epoch]]
    records.insert(2, {"event": "epoch", "epoch": 1, "test_accuracy": 0.1, "test_loss": 9.0})
    records.append({"event": "end", "test_accuracy": 0.9, "test_loss": 0.3, "stopped": ""})
    found = script.result(records)
    assert {"test_accuracy": 0.9, "test_loss": 0.3, "epoch_losses": [3.0, 0.75]} == found
    assert pytest.approx(0.2) == script.difference([3.3, 0.6], found["epoch_losses"])


@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())
def test_split_runs_are_compared_with_the_serial_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, document = tmp_path / "out.json", tmp_path / "page.md"
    document.write_text("<!-- begin: accuracy-plans -->\n<!-- end: accuracy-plans -->\n")
    argv = ["lenet5", "--ranks", "2", "--algorithm", "ring", "--set", "train.steps=3", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["script", *argv, "--document", str(document)])
    assert 0 == script.main()
    serial, split = json.loads(out.read_text())
    assert [("serial", 1), ("preset=hybrid, ring", 2)] == [(run["name"], run["ranks"]) for run in (serial, split)]
    assert script.difference(split["epoch_losses"], serial["epoch_losses"]) < 1e-5
    lines = document.read_text().splitlines()
    assert any(line.startswith("| preset=hybrid, ring | 2 |") for line in lines)
    monkeypatch.setattr(sys, "argv", ["script", *argv, "--plan", "preset=diagonal"])
    assert 2 == script.main()
    assert "'plan.preset' (='diagonal')" in capsys.readouterr().err
