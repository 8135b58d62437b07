"""The check of reproducible runs: it looks at every bit, and says so where runs differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcnn.train import model_file

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import check_reproducible as script


def leave(folder: Path, value: float, loss: float = 1.0) -> None:
    """Leave what a run would."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    tensors = {"fc/weight": np.array([[1.0, value]], np.float32)}
    made = model_file.Checkpoint(model="lenet5", parameters=tensors, optimizer={"velocity": tensors}, step=4)
    for name in ("final.h5", "checkpoints/step-00000002.h5", "checkpoints/step-00000004.h5"):
        model_file.write(folder / name, made)
    record = {"event": "step", "step": 4, "loss": loss, "step_s": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


@pytest.mark.parametrize(
    ("value", "loss", "code"), [(2.0, 1.0, 0), (float(np.nextafter(np.float32(2), 3)), 1.0, 1), (2.0, 1.0 + 2e-16, 1)]
)
def test_it_fails_where_one_bit_differs(
    value: float, loss: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[int, bool]] = []

    def train(folder: Path, model: str, ranks: int, settings: list[str], *, resume: bool = False) -> None:
        assert "train.reproducible=true" in settings
        assert not resume or [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002.h5"]
        ran.append((ranks, resume))
        leave(folder, *((value, loss) if ranks == 2 else (2.0, 1.0)))

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(sys, "argv", ["check", "lenet5", "--ranks", "1", "2", "--steps", "4"])
    assert code == script.main()
    assert [(1, False), (2, False), (4, False), (3, True)] * 2 == ran
    assert ("the runs of lenet5 differ" in capsys.readouterr().err) == (code == 1)
