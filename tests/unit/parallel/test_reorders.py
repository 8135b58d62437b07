"""oneDNN converts filters to formats of its own; activations it takes and leaves as they lie."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcnn.nn import models
from hpcnn.ops import onednn


def test_a_training_step_reorders_filters_and_nothing_else(tmp_path: Path) -> None:
    if not onednn.available():
        pytest.skip("the library of oneDNN is not there")
    program = [sys.executable, "-m", "hpcnn", "train", "resnet20", "--out", str(tmp_path / "run")]
    settings = ["train.steps=1", "train.global_batch=7", "data.num_samples=7", "data.source=synthetic"]
    for setting in settings:
        program += ["--set", setting]
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line.split(",") for line in result.stdout.splitlines() if line.startswith("onednn_verbose,exec")]
    assert {"convolution", "batch_normalization"} <= {line[3] for line in lines}, "the library was not used"
    spec = models.build("resnet20", (32, 32, 3), 10)
    shapes = [layer.parameters["weight"] for layer in spec.layers if "weight" in layer.parameters]
    filters = {"x".join(map(str, (K, C, R, S))) for K, R, S, C in (shape for shape in shapes if len(shape) == 4)}
    reordered = {line[-2] for line in lines if line[3] == "reorder"}
    assert reordered
    assert reordered <= filters
