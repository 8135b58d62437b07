"""`hpcnn analyze` on a small run: the table, the pictures, and what training does to the plane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcnn.analysis.plane_file import FILE, read
from tests.launch import launch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with a measured plane."""
    folder = tmp_path_factory.mktemp("run") / "lenet"
    settings = ["train.steps=120", "log.evaluate_every_epochs=0", "checkpoint.every_epochs=0", "train.lr=0.2"]
    settings += [
        "analysis.samples=100",
        "analysis.errors=true",
        "analysis.alpha=1.01",
        "analysis.information_plane_every_steps=30",
        "analysis.maps_every=2",
    ]
    settings += ["data.crop_padding=0", "data.flip=false"]
    words = ["train", "lenet5", "--out", str(folder), *(word for one in settings for word in ("--set", one))]
    done = launch(1, "hpcnn", words)
    assert done.returncode == 0, done.stderr
    return folder


def test_layers_tell_less_of_the_images_and_more_of_the_labels(run: Path) -> None:
    found = read(run / FILE)
    assert found is not None
    I_x, I_y = found.columns["I_x"], found.columns["I_y"]
    assert found.columns["step"].tolist() == [0, 30, 60, 90, 120]
    conv1, conv2, fc1, fc2, fc3 = I_x[1:].mean(axis=0)
    assert conv1 > fc1 > fc2
    assert min(conv1, conv2) > fc3
    assert I_y[-1, -1] > I_y[1:-1, -1].min()
    growing = np.diff(found.columns["maps/conv2/growing_I_x"], axis=1)
    assert (growing > 0).all()
    last = found.columns["errors/I_top"].mean(axis=0)
    assert last[-1] > last[0]


def test_table_and_pictures(run: Path, tmp_path: Path) -> None:
    done = launch(1, "hpcnn", ["analyze", "information-plane", str(run), "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    for word in ("conv1", "fc3", "I(T;Y)", "5 measurements", "inequality forward", "inequality backward"):
        assert word in done.stdout
    for name in ("information-plane", "inequalities", "feature-maps"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_a_run_without_a_plane_is_named(tmp_path: Path) -> None:
    done = launch(1, "hpcnn", ["analyze", "information-plane", str(tmp_path)])
    assert done.returncode == 1
    assert len(done.errors) == 1
    assert "analysis.information_plane_every_steps" in done.errors[0]
