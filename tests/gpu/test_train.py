"""`hpcnn train` on a GPU follows the run on one CPU rank: the same images, draws and weights, whoever computes."""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.launch import launch, reason_to_skip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())]

STEPS = 12
SMALL = ("train.steps=12", "train.schedule=constant", "train.warmup_epochs=0", "checkpoint.every_epochs=0")
MODELS = {
    "lenet5": ("train.global_batch=60", "train.lr=0.02"),
    "resnet20": ("train.global_batch=12", "data.source=synthetic", "data.num_samples=48", "train.lr=0.002"),
}
# Each step feeds on the last: after a dozen, differences in rounding have grown about a hundredfold.
TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 8e-2}


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    from hpcnn.errors import DeviceError
    from hpcnn.ops.cuda.gpu import load

    try:
        load()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _longer() -> None:
    """Give each test five minutes instead of pytest's usual limit: the first to come compile all kernels."""
    faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)


def losses(model: str, out: Path, ranks: int, *settings: str) -> np.ndarray:
    """Return the losses of a run's steps."""
    words = ["train", model, "--out", str(out)]
    for setting in (*SMALL, *MODELS[model], *settings):
        words += ["--set", setting]
    result = launch(ranks, "hpcnn", words, timeout=240, env={"OMP_NUM_THREADS": "2"})
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = np.array([record["loss"] for record in records if record["event"] == "step"])
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize(
    ("model", "compute", "ranks", "settings"),
    [
        ("lenet5", "fp32", 1, ()),
        ("lenet5", "tf32", 1, ()),
        ("lenet5", "bf16", 1, ()),
        ("lenet5", "fp32", 2, ()),
        ("lenet5", "fp32", 3, ("exchange.kind=sharded", "exchange.algorithm=ring")),
        ("lenet5", "fp32", 2, ("exchange.kind=factors", "exchange.overlap=false")),
        ("lenet5", "fp32", 2, ("exchange.algorithm=mpi", "exchange.wait=step")),
        ("lenet5", "fp32", 4, ("plan.preset=spatial",)),
        ("lenet5", "fp32", 2, ("plan.preset=hybrid",)),
        ("lenet5", "fp32", 2, ("exchange.lazy_layers=1", "exchange.lazy_steps=3")),
        ("lenet5", "bf16", 2, ("plan.preset=spatial",)),
        ("lenet5", "bf16", 2, ("exchange.wire=bf16", "train.optimizer=adam", "train.lr=0.001")),
        ("resnet20", "fp32", 1, ()),
        ("resnet20", "fp32", 2, ()),
        ("resnet20", "tf32", 2, ("plan.preset=spatial",)),
        ("resnet20", "bf16", 3, ()),
    ],
)
def test_training_follows_one_cpu_rank(
    tmp_path: Path, model: str, compute: str, ranks: int, settings: tuple[str, ...]
) -> None:
    recipe = tuple(setting for setting in settings if setting.startswith(("train.", "exchange.lazy")))
    expected = losses(model, tmp_path / "cpu", 1, *recipe)
    got = losses(model, tmp_path / "gpu", ranks, "device=cuda", f"train.compute={compute}", *settings)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE[compute])


def test_one_and_two_ranks_on_one_gpu_learn_alike(tmp_path: Path) -> None:
    one = losses("resnet20", tmp_path / "one", 1, "device=cuda")
    two = losses("resnet20", tmp_path / "two", 2, "device=cuda")
    np.testing.assert_allclose(two, one, rtol=2e-4)


def test_a_batch_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    words = ["train", "vgg16-32", "--out", str(tmp_path / "run")]
    for setting in ("device=cuda", "data.source=synthetic", "train.steps=1", "train.global_batch=512"):
        words += ["--set", setting]
    result = launch(1, "hpcnn", words, timeout=240, env={"CUPY_GPU_MEMORY_LIMIT": str(300 << 20)})
    assert result.returncode != 0
    assert len(result.errors) == 1, result.stderr[-3000:]
    assert "out of memory" in result.errors[0]
