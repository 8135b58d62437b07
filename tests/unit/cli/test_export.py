"""`hpcnn export` from the outside: a trained run against what its own evaluation says of the same images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcnn.config import DataConfig
from hpcnn.data import open_data
from tests.launch import Result, environment, launch, reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


def export(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpcnn", "export", *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=50, check=False, cwd=folder, env=environment()
    )


def hpcnn(folder: Path, *args: str) -> Result:
    return launch(2, "hpcnn", args, cwd=folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a LeNet-5 that two ranks have trained a little, on the built-in images."""
    folder = tmp_path_factory.mktemp("export")
    settings = ("--set", "train.steps=20", "--set", "log.evaluate_every_epochs=0")
    done = hpcnn(folder, "train", "lenet5", *settings, "--out", "run")
    assert done.returncode == 0, done.stderr
    return folder


def test_an_exported_run_scores_what_evaluate_says(run: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; pip install 'hpcnn[test]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'hpcnn[test]'")
    done = export(run, "run", "--onnx", "model.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    assert "lenet5 after step 20" in done.stdout
    assert "uint8 (N, 28, 28, 1)" in done.stdout
    onnx.checker.check_model(run / "model.onnx", full_check=True)

    with open_data(DataConfig(source="builtin"), "test") as data:
        images, labels = data.read(np.arange(len(data)))
        names = list(data.class_names)
    session = runtime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images})
    largest = logits.max(axis=1, keepdims=True)
    losses = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    score = json.loads(hpcnn(run, "evaluate", "run", "--json").stdout)
    assert score["accuracy"] > 0.3
    assert score["accuracy"] == pytest.approx((logits.argmax(axis=1) == labels).mean(), abs=1e-12)
    assert score["loss"] == pytest.approx(losses.mean(dtype=np.float64), rel=1e-5)
    assert names == json.loads(session.get_modelmeta().custom_metadata_map["class_names"])


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_path_that_holds_no_network_is_one_line(run: Path, command: str) -> None:
    (run / "empty").mkdir(exist_ok=True)
    options = ["--onnx", "none.onnx"] if command == "export" else []
    done = subprocess.run(
        [sys.executable, "-m", "hpcnn", command, "empty", *options],
        capture_output=True, text=True, timeout=50, check=False, cwd=run, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "hpcnn: error: checkpoint: 'empty' is neither a model file nor a run folder with checkpoints."
    ]
    assert not (run / "none.onnx").exists()


def test_a_damaged_checkpoint_is_refused_and_an_older_file_stays(run: Path) -> None:
    damaged = bytearray((run / "run" / "final.h5").read_bytes())
    for place in range(len(damaged) // 2, len(damaged) // 2 + 4096, 64):
        damaged[place] ^= 0xFF
    (run / "damaged.h5").write_bytes(damaged)
    (run / "old.onnx").write_bytes(b"old")
    done = export(run, "damaged.h5", "--onnx", "old.onnx")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("hpcnn: error: checkpoint: 'damaged.h5' ")
    assert (run / "old.onnx").read_bytes() == b"old"
