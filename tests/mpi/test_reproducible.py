"""Reproducible runs: parameters, optimizer state, statistics and losses have the bits of a run on one rank."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.comm import World
from hpcnn.errors import CheckpointError, PlanError
from hpcnn.plan.schedules import tree
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train import reproducible
from hpcnn.train.setup import assemble
from hpcnn.train.trainer import Trainer
from tests.checks import spmd_assert
from tests.worlds import alone, world

STEPS, MIDDLE = 3, 2
RECIPES = {
    "lenet5": ("data.image_shape=[16, 16, 1]", "train.global_batch=26", "model.dropout=0.3"),
    "resnet20": ("data.image_shape=[8, 8, 3]", "train.global_batch=19", "train.lr=0.02"),
}
COMMON = (
    "data.source=synthetic",
    "data.num_samples=60",  # the last batch of the test images is shorter, and some shards have none of it
    "train.reproducible=true",
    "train.virtual_shards=8",
    f"train.steps={STEPS}",
    f"checkpoint.every_steps={MIDDLE}",
    "checkpoint.keep=9",
    "data.prefetch=0",
)


def run(folder: Path, model: str, *overrides: str, on: World, resume: bool = False) -> None:
    config = configuration.load(model, [*COMMON, *RECIPES[model], *overrides])
    trainer = Trainer(assemble(config, on), folder, progress_stream=io.StringIO(), result_stream=io.StringIO())
    trainer.prepare(resume=resume)
    trainer.train()


def digest(folder: Path) -> str:
    """Return what stands for the final model file, all its tensors, and all losses and accuracies."""
    final = checkpoints.load(folder / "final.h5")
    sums = hashlib.sha256()
    groups = {"parameters": final.parameters, "statistics": final.statistics, **final.optimizer}
    for group, tensors in sorted(groups.items()):
        for name, tensor in sorted(tensors.items()):
            sums.update(f"{group}/{name}".encode() + np.ascontiguousarray(tensor).tobytes())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        names = ("event", "step", "loss", "accuracy", "test_loss", "test_accuracy")
        sums.update(repr([record.get(name) for name in names]).encode())
    return sums.hexdigest()


def on_rank_0(make: Callable[[], str]) -> str:
    """Return on all ranks what rank 0 makes of files, or of a run alone (collective)."""
    world().barrier()
    return str(world().broadcast_obj(make() if world().rank == 0 else None))


@cache
def one_rank(model: str, *overrides: str) -> str:
    """Return the digest of a run on one rank."""

    def make() -> str:
        with tempfile.TemporaryDirectory(prefix="hpcnn-test-") as place:
            run(Path(place), model, *overrides, on=alone())
            return digest(Path(place))

    return on_rank_0(make)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("lenet5", ("exchange.kind=allreduce", "exchange.overlap=false")),
        ("lenet5", ("exchange.kind=sharded",)),
        ("resnet20", ("exchange.kind=allreduce", "exchange.bucket_bytes=20000")),
        ("resnet20", ("exchange.kind=sharded", "exchange.wait=step")),
    ],
)
def test_any_number_of_ranks_gives_the_bits_of_one_also_when_it_changes_in_the_middle(
    folder: Path, model: str, settings: tuple[str, ...]
) -> None:
    run(folder / "whole", model, *settings, on=world())
    found = on_rank_0(lambda: digest(folder / "whole"))
    assert one_rank(model) == found

    fewer = max(1, world().size - 1)
    on_rank_0(lambda: _forget(folder / "whole"))
    some = world().split(int(world().rank >= fewer))
    if world().rank < fewer:  # a world of its own: the others have no part in it
        run(folder / "whole", model, *settings, on=some, resume=True)
    resumed = on_rank_0(lambda: digest(folder / "whole"))
    spmd_assert(world().comm, found == resumed, "the resumed run has other bits")


def _forget(folder: Path) -> str:
    """Remove all checkpoints but the one in the middle."""
    for path in [*(folder / "checkpoints").iterdir(), folder / "final.h5", folder / "best.h5"]:
        if path.exists() and path.name != f"step-{MIDDLE:08d}.h5":
            path.unlink()
    return ""


@pytest.mark.parametrize(
    "rule", [("train.optimizer=lars", "train.clip_norm=0.5"), ("train.optimizer=adam", "train.label_smoothing=0.1")]
)
def test_rules_that_look_at_norms_or_keep_two_moments_keep_the_bits(folder: Path, rule: tuple[str, ...]) -> None:
    short = ("train.steps=2", "train.virtual_shards=11", *rule)  # no power of two
    run(folder, "lenet5", *short, on=world())
    assert one_rank("lenet5", *short) == on_rank_0(lambda: digest(folder))


def test_another_order_of_sums_would_be_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def running(nodes: list[tree.Node], num_shards: int) -> int:
        additions = len(nodes) - 1
        del nodes[1:]
        return additions

    expected = one_rank("lenet5", "train.steps=2")
    monkeypatch.setattr(tree, "settle", running)  # one shard after the other
    tree.pieces.cache_clear()
    try:
        run(folder, "lenet5", "train.steps=2", on=world())
        found = on_rank_0(lambda: digest(folder))
    finally:
        tree.pieces.cache_clear()
    assert expected != found


def test_what_would_change_the_bits_is_refused_on_all_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if world().size > 1:
        with pytest.raises(PlanError, match=rf"{world().size} ranks share train.virtual_shards \(=1\)"):
            run(folder, "lenet5", "train.virtual_shards=1", on=world())
        with monkeypatch.context() as patch:
            patch.setattr(reproducible, "processor", lambda: f"a processor of rank {world().rank}")
            with pytest.raises(PlanError, match=r"processor a processor of rank 1 instead of a processor of rank 0"):
                run(folder, "lenet5", on=world())
    run(folder, "lenet5", "train.steps=2", on=world())
    with pytest.raises(CheckpointError, match=r"virtual shards 8 then, 9 now"):
        run(folder, "lenet5", "train.virtual_shards=9", on=world(), resume=True)
    monkeypatch.setattr(world(), "num_threads", 2)
    monkeypatch.setattr(world(), "threads_are_chosen", True)
    with pytest.raises(CheckpointError, match=r"threads of a rank 1 then, 2 now"):
        run(folder, "lenet5", on=world(), resume=True)
