"""What the experiments on averages of replicas prepare and make of their runs; they are played small."""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from hpcnn.data.hdf5 import Hdf5DataSet
from hpcnn.data.shards import held_out, shards
from tests.launch import reason_to_skip

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import experiment_averaging as averaging
import experiment_mixing as mixing


def test_noise_is_in_one_shard_only_and_not_in_the_held_out_images(tmp_path: Path) -> None:
    original = Path(str(resources.files("hpcnn.data") / "builtin" / "fashion-mini-train.h5"))
    copy = tmp_path / "train.h5"
    shutil.copyfile(original, copy)
    parts = averaging.fractions("noisy", 4, 0.5)
    averaging.add_noise(copy, 0.8, parts, 500, seed=7)
    with Hdf5DataSet(original) as right, Hdf5DataSet(copy) as noisy:
        everything = np.arange(len(right))
        wrong = np.flatnonzero(right.labels_of(everything) != noisy.labels_of(everything))
    rows, _ = held_out(len(everything), 500, seed=7)
    shard = shards(rows, parts, seed=7)[averaging.NOISY_SHARD]
    assert set(wrong) <= set(shard)
    assert abs(len(wrong) / len(shard) - 0.8 * 0.9) < 0.05  # a label in ten is drawn again as it was


def test_unequal_shards_shrink_by_the_ratio() -> None:
    assert averaging.fractions("alike", 4, 0.5) == [0.25] * 4
    assert averaging.fractions("unequal", 3, 0.5) == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_the_table_has_epochs_to_the_target_and_how_many_runs_reached_it() -> None:
    assert averaging.epochs_to([0.5, 0.8, 0.7], 0.8) == 2
    assert averaging.epochs_to([0.5, 0.7], 0.8) is None
    curves = {1: [0.5, 0.8, 0.9], 2: [0.8, 0.8, 0.8]}
    found = [{"condition": "alike", "rule": "equal", "accuracies": curves[seed]} for seed in curves]
    found += [{"condition": "noisy", "rule": "equal", "accuracies": curve} for curve in (curves[1], [0.1, 0.2, 0.3])]
    args = averaging.make_parser().parse_args(
        ["--rules", "equal", "--conditions", "alike", "noisy", "unequal", "--seeds", "1", "2"]
    )
    rows = averaging.report(args, found).splitlines()
    assert rows[2] == "| equal | 1.5 ± 0.7 | 0.8500 ± 0.0707 | 1 of 2 | 0.6000 ± 0.4243 |  |  |"


@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())
def test_mixing_on_two_ranks_sends_what_an_all_reduce_sends() -> None:
    four = list(mixing.ways(4))
    assert "average every 2 steps" in four
    ways = mixing.ways(2)
    chosen = {name: ways[name] for name in ("all-reduce of gradients", "butterfly mixing")}
    args = argparse.Namespace(
        preset="lenet5-mixing", ranks=2, seeds=[1], set=["train.steps=3", "train.warmup_epochs=0"], json=None
    )
    summed, mixed = mixing.measure(args, chosen)
    assert summed["bytes"] == mixed["bytes"] > 4 * 61_000
    assert "butterfly mixing" in mixing.report(args, [summed, mixed])
