"""Configuration: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpcnn import configuration
from hpcnn.config import Config
from hpcnn.errors import ConfigError
from hpcnn.nn import models

REPRODUCIBLE = ("train.reproducible=true",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=0.1", "unknown key 'train.learning_rate'. Did you mean 'train.lr'?"),
        ("train.epoch=3", "unknown key 'train.epoch'. Did you mean 'train.epochs'?"),
        ("exchnage.kind=allreduce", "unknown key 'exchnage'."),
        ("lr=0.1", "Did you mean 'train.lr'?"),
        ('train.lr="fast"', "'train.lr' (='fast'): expected `float`, got `str`"),
        ("train.global_batch=0", "'train.global_batch' (=0): expected `int` >= 1"),
        ("train.global_batch=2.5", "'train.global_batch' (=2.5): expected `int`"),
        ("train.seed=true", "'train.seed' (=True): expected `int`, got `bool`"),
        ("train.lr=nan", "'train.lr' (=nan)"),
        (
            "exchange.algorithm=rng",
            "must be 'auto' or 'butterfly' or 'halving-doubling' or 'ring' or 'pairwise' or 'hierarchical'",
        ),
        ("device=gpu", "'device' (='gpu'): must be 'cpu' or 'cuda'"),
        ("plan.preset=hybird", "'plan.preset' (='hybird'): must be 'data' or 'hybrid' or 'hybrid-rows'"),
        ("data.image_shape=[1,2]", "'data.image_shape' (=[1, 2]): expected `array` of length 3"),
        ("train=3", "'train' (=3) must be a section"),
        ("train.lr", "must read section.key=value"),
        ("train.lr.x=3", "'lr' is a value, not a section"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name_and_the_rule(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.load("lenet5", [override])
    assert message in str(caught.value)
    assert str(caught.value).startswith("config: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.compute=tf32"], "'train.compute' (='tf32') needs a GPU, 'device' is 'cpu'. Set device = \"cuda\""),
        (["train.compute=fp64", "device=cuda"], "'train.compute' (='fp64') runs on plain NumPy, 'device' is 'cuda'"),
        (["exchange.algorithm=nccl"], "'exchange.algorithm' (='nccl') needs device = \"cuda\", which is 'cpu'"),
        (
            ["device=cuda", "exchange.algorithm=nccl", "exchange.kind=sharded"],
            "needs exchange.kind = \"allreduce\", which is 'sharded'",
        ),
        (["device=cuda", "exchange.algorithm=nccl", "exchange.wire=bf16"], 'needs exchange.wire = "fp32"'),
        (
            ["device=cuda", "exchange.algorithm=nccl", "fault.on_rank_failure=continue"],
            "'fault.on_rank_failure' (='continue') needs collectives that survive a rank",
        ),
        (["fault.spare_ranks=2"], "'fault.spare_ranks' (=2) would stand by for nothing"),
        (["average.rule=equal", "fault.on_rank_failure=continue"], "'average.rule' trains several"),
        (["separation.method=rejection", "fault.on_rank_failure=continue"], "'separation.method' trains several"),
        (["average.rule=softmax"], "(='softmax') scores replicas on held-out images. Set average.validation_samples"),
        (["average.rule=equal", "exchange.lazy_layers=1"], "lazy layers have not updated yet"),
        (
            ["average.rule=equal", "average.momentum=reset", "train.optimizer=adam"],
            "'average.momentum' (='reset') does not go with adam",
        ),
        (["average.rule=equal", "separation.method=geodesic"], "does not go with 'separation.method' (='geodesic')"),
        (["average.rule=equal", "average.shards=[0.5,0.4]"], "'average.shards' (=[0.5, 0.4]) must add up to 1."),
        ([*REPRODUCIBLE, "device=cuda"], '\'train.reproducible\' needs device = "cpu", which is "cuda"'),
        ([*REPRODUCIBLE, "train.compute=bf16"], 'needs train.compute = "fp32" or "fp64", which is "bf16"'),
        ([*REPRODUCIBLE, "model.sync_batchnorm=false"], "needs model.sync_batchnorm = true, which is false"),
        ([*REPRODUCIBLE, "plan.preset=hybrid"], 'needs plan.preset = "data", which is "hybrid"'),
        ([*REPRODUCIBLE, "plan.turns=[2,1]"], "needs plan.turns = [1, 1], which is [2, 1]"),
        ([*REPRODUCIBLE, "exchange.kind=factors"], 'needs exchange.kind = "allreduce" or "sharded"'),
        ([*REPRODUCIBLE, "exchange.algorithm=mpi"], "needs exchange.algorithm = "),
        ([*REPRODUCIBLE, "exchange.wire=fp16"], 'needs exchange.wire = "fp32", which is "fp16"'),
        ([*REPRODUCIBLE, "exchange.lazy_layers=1"], "needs exchange.lazy_layers = 0, which is 1"),
        ([*REPRODUCIBLE, "average.rule=equal"], 'needs average.rule = "none", which is "equal"'),
        ([*REPRODUCIBLE, "separation.method=geodesic"], 'needs separation.method = "none"'),
        ([*REPRODUCIBLE, "analysis.information_plane_every_steps=1"], "information_plane_every_steps = 0, which is 1"),
        ([*REPRODUCIBLE, "train.global_batch=15"], "(=15) must be at least 'train.virtual_shards' (=16)"),
        ([*REPRODUCIBLE, "exchange.kind=sharded", "train.clip_norm=1.0"], "cannot have train.clip_norm"),
        ([*REPRODUCIBLE, "exchange.kind=sharded", "train.optimizer=lars"], "cannot have train.optimizer = 'lars'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.load("lenet5", overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp64"])
def test_cpus_compute_in_three_formats(compute: str) -> None:
    assert configuration.load("lenet5", [f"train.compute={compute}"]).train.compute == compute


@pytest.mark.parametrize("compute", ["fp32", "tf32", "bf16"])
def test_gpus_compute_in_three_formats(compute: str) -> None:
    config = configuration.load("lenet5", ["device=cuda", f"train.compute={compute}", "exchange.algorithm=nccl"])
    assert config.train.compute == compute


@pytest.mark.parametrize(
    ("text", "message"), [("train = [", "is not valid TOML"), ("[train]\nlr = 0.1\nlr = 0.2", "is not valid TOML")]
)
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        configuration.load(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        configuration.load(path)


def test_a_missing_file_is_met_with_the_nearest_preset() -> None:
    with pytest.raises(ConfigError, match=r"neither a preset nor a file\. Did you mean 'resnet20'"):
        configuration.load("resnet2")


@pytest.mark.parametrize("name", configuration.presets())
def test_every_preset_loads_and_survives_a_round_trip(name: str) -> None:
    config = configuration.load(name)
    # A preset bears its model's name, alone or first; a system's preset trains LeNet-5.
    assert config.model.name == name or name.startswith(f"{config.model.name}-") or config.model.name == "lenet5"
    assert configuration.from_toml(configuration.to_toml(config), "text") == config


def test_there_is_a_preset_for_every_model() -> None:
    assert set(configuration.presets()) >= set(models.names())


def test_overrides_are_toml_or_else_plain_text() -> None:
    config = configuration.load(
        "lenet5", ["train.lr=1e-3", "data.source=some/folder", "train.milestones=[1, 2.5]", "data.flip=false"]
    )
    assert (config.train.lr, config.data.source, config.data.flip) == (1e-3, "some/folder", False)
    assert config.train.milestones == (1, 2.5)


def test_the_configuration_cannot_be_changed_after_loading() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["analysis.width=alignment"], "analysis.width"),
        (["analysis.kernel=tensor", "analysis.maps_every=2"], "analysis.maps_every"),
        (["analysis.alpha=0"], "analysis.alpha"),
        (["analysis.samples=1"], "analysis.samples"),
    ],
)
def test_an_analysis_that_cannot_be_made_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        configuration.load("lenet5", overrides)
