"""Training and evaluation with subspaces kept apart, from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcnn import configuration
from tests.launch import Result, launch, reason_to_skip
from tests.unit.cli.test_train import assert_refused

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

TINY = (
    *("data.source=synthetic", "data.image_shape=[12,12,1]", "data.num_classes=3", "data.num_samples=40"),
    *("train.steps=2", "train.global_batch=8", "separation.dimension=3"),
)


def hpcnn(folder: Path, *words: str, overrides: tuple[str, ...] = (), n: int = 1) -> Result:
    settings = [word for one in overrides for word in ("--set", one)]
    return launch(n, "hpcnn", [*words, *settings], cwd=folder, timeout=60)


def test_one_network_is_evaluated_with_its_angles(tmp_path: Path) -> None:
    done = hpcnn(tmp_path, "train", "lenet5-geodesic", "--out", "run", overrides=TINY)
    assert done.returncode == 0, done.stderr
    words = hpcnn(tmp_path, "evaluate", "run").stdout
    assert "accuracy by the smallest rejection" in words
    assert [line.split()[0] for line in words.splitlines()[-5:]] == ["angle", "-----", "0", "1", "2"]


def test_networks_of_classes_are_trained_and_evaluated_together(tmp_path: Path) -> None:
    done = hpcnn(tmp_path, "train", "lenet5-rejection", "--out", "run", overrides=TINY, n=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("network of class") == 2  # the other group's third is not shown
    score = json.loads(hpcnn(tmp_path, "evaluate", "run", "--json").stdout)
    assert f"test accuracy {score['accuracy']:.4f} by thresholds" in done.stdout
    assert len(score["thresholds"]) == 3
    assert configuration.load(tmp_path / "run" / "config.toml").separation.method == "rejection"
    one = hpcnn(tmp_path, "evaluate", "run/class-001/final.h5")
    assert_refused(one, "is the network of one class; name the folder of the whole run", code=2)


@pytest.mark.parametrize(
    ("overrides", "words", "message"),
    [
        (("separation.dimension=28",), (), "the 84 features of layer 'fc2' must be more than 3 classes times 28"),
        (("separation.method=rejection",), ("--init", "other.h5"), "--init is of one network"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], words: tuple[str, ...], message: str
) -> None:
    done = hpcnn(tmp_path, "train", "lenet5-geodesic", "--out", "run", *words, overrides=(*TINY, *overrides), n=2)
    assert_refused(done, message, code=2)
