"""Exported runs: the numbers of the checkpoint with the data set's own, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.config import Config
from hpcnn.data import open_data
from hpcnn.errors import CheckpointError, ConfigError
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train import export
from hpcnn.train.checkpoint import Checkpoint

CONFIG = configuration.from_toml(
    '[model]\nname = "resnet20"\n[data]\nsource = "synthetic"\nimage_shape = [9, 8, 3]\nnum_samples = 16\n', "test"
)


def make_checkpoint(config: Config = CONFIG, dtype: type = np.float32, **changes: object) -> Checkpoint:
    with open_data(config.data, "train") as data:
        model = Model(models.configured(config.model, data.image_shape, data.num_classes), 1, dtype)
        tensors, fingerprint = checkpoints.tensors_of(model.parameters), data.fingerprint()
    made = Checkpoint(
        model=model.spec.name,
        parameters=tensors,
        statistics=model.statistics | {"separation/matrices": np.zeros((10, 6))},  # a loss's own, left out of the file
        config=configuration.to_toml(config),
        step=5,
        data_fingerprint=fingerprint,
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_file_holds_the_checkpoints_numbers_and_the_data_sets(tmp_path: Path, dtype: type) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; pip install 'hpcnn[test]'")
    made = make_checkpoint(dtype=dtype)
    export.export_onnx(tmp_path / "model.onnx", made, CONFIG)
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    tensors = {one.name: onnx.numpy_helper.to_array(one) for one in graph.graph.initializer}
    assert np.array_equal(made.parameters["fc/weight"].astype(np.float32), tensors["fc/weight"])
    assert np.array_equal(made.statistics["norm1/running_var"].astype(np.float32), tensors["norm1/running_var"])
    assert tensors["input/scale"] == pytest.approx([1 / (255 * 0.205)] * 3, rel=1e-6)
    assert tensors["input/shift"] == pytest.approx([0.498 / 0.205] * 3, rel=1e-6)
    found = {entry.key: entry.value for entry in graph.metadata_props}
    assert ("5", made.data_fingerprint) == (found["step"], found["data_fingerprint"])
    assert [tmp_path / "model.onnx"] == list(tmp_path.iterdir())


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"needs the package 'onnx'. pip install 'hpcnn\[onnx\]'"):
        export.export_onnx(tmp_path / "model.onnx", make_checkpoint(), CONFIG)
    assert [] == list(tmp_path.iterdir())


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _onnx(self) -> None:
        pytest.importorskip("onnx", reason="onnx is not installed; pip install 'hpcnn[test]'")

    def refused(self, path: Path, made: Checkpoint, config: Config, error: type[Exception], words: str) -> None:
        before = sorted(path.parent.iterdir()) if path.parent.exists() else []
        with pytest.raises(error, match=words):
            export.export_onnx(path, made, config)
        assert before == (sorted(path.parent.iterdir()) if path.parent.exists() else [])

    def test_other_images_than_those_of_training(self, tmp_path: Path) -> None:
        other = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, num_samples=17))
        self.refused(tmp_path / "a.onnx", make_checkpoint(), other, CheckpointError, "trained on other images")

    def test_a_checkpoint_of_another_model(self, tmp_path: Path) -> None:
        other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, name="lenet5"))
        data = dataclasses.replace(CONFIG.data, image_shape=(28, 28, 3))
        other = dataclasses.replace(other, data=data)
        made = dataclasses.replace(make_checkpoint(), data_fingerprint=make_checkpoint(other).data_fingerprint)
        self.refused(
            tmp_path / "a.onnx", made, other, CheckpointError, "is of 'resnet20', this run's model is 'lenet5'"
        )

    def test_a_checkpoint_without_its_statistics(self, tmp_path: Path) -> None:
        made = make_checkpoint(statistics={})
        self.refused(tmp_path / "a.onnx", made, CONFIG, CheckpointError, "missing: norm1/running_mean")

    def test_more_than_a_file_holds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export, "LARGEST_BYTES", 1_000_000)
        self.refused(tmp_path / "a.onnx", make_checkpoint(), CONFIG, CheckpointError, "one ONNX file holds at most")

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        path = tmp_path / "no" / "a.onnx"
        self.refused(path, make_checkpoint(), CONFIG, ConfigError, "cannot write .*No such file or directory")
