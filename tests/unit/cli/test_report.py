"""A run of two ranks from its start to its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hpcnn
from tests.launch import launch, reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    words = ["train", "lenet5", "--set", "train.steps=4", "--set", "train.global_batch=12", "--trace", "3"]
    done = launch(2, "hpcnn", [*words, "--out", "run"], cwd=folder, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_leaves_what_it_ran_on(run: Path):
    facts = json.loads((run / "environment.json").read_text())
    (host,) = facts["hosts"]
    assert (host["ranks"], host["threads"]) == (2, 2)
    assert facts["nodes"] == [0, 0]
    assert facts["command"][1:3] == ["train", "lenet5"]
    assert facts["program"]["hpcnn"] == hpcnn.__version__
    assert facts["data"] == {"image_shape": [28, 28, 1], "num_classes": 10, "train_images": 5000, "test_images": 1000}


def test_its_page_has_all_of_it(run: Path):
    pytest.importorskip("jinja2", reason="needs hpcnn[report]")
    done = launch(1, "hpcnn", ["report", str(run)], cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "note:" not in done.stdout
    page = (run.parent / "report.html").read_text(encoding="utf-8")
    for name in ("loss", "step-1", "timeline-1", "ranks-1"):
        assert f'<figure id="{name}"' in page
    assert "gradient sum of conv1" in page


def test_a_folder_that_is_no_run_is_one_line(run: Path):
    pytest.importorskip("jinja2", reason="needs hpcnn[report]")
    done = launch(1, "hpcnn", ["report", str(run.parent)], cwd=run.parent)
    assert done.returncode == 1
    assert len(done.errors) == len(done.stderr.splitlines()) == 1
    assert "holds no metrics.jsonl" in done.errors[0]
