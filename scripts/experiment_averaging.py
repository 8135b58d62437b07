#!/usr/bin/env python3
"""Compare rules that average replicas: on shards that are alike, with wrong labels in one, and of unlike sizes.

    scripts/experiment_averaging.py --ranks 4 --seeds 1 2 3 --document docs/experiments.md

Every rank trains a replica by a preset's recipe on a shard of its own, and all are averaged once an epoch. The table
has the epochs until the average reaches an accuracy on the test images, and its accuracy in the end: means and standard
deviations over the seeds, which draw weights, shards and order. A rule of "none" trains one network on all images, the
held-out ones included, with summed gradients.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

import numpy as np
from bench_accuracy_plans import train
from virtual import training

from hpcnn.data.shards import held_out, shards

RULES = ["none", "equal", "size", "accuracy", "inverse-loss", "softmax", "best"]
CONDITIONS = ["alike", "noisy", "unequal"]
NOISY_SHARD = 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="lenet5-averaging", help="on the built-in images (%(default)s)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="replicas (4)")
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES, metavar="RULE", help=" ".join(RULES))
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS, choices=CONDITIONS, metavar="CONDITION")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED", help="repeats (1 2 3)")
    parser.add_argument("--noise", type=float, default=0.8, help="part of one shard's labels that is drawn anew (0.8)")
    parser.add_argument("--ratio", type=float, default=0.5, help="size of a shard to the one before, if unequal (0.5)")
    parser.add_argument("--held-out", type=int, default=500, metavar="COUNT", help="images to score with (500)")
    parser.add_argument("--target", type=float, default=0.8, help="the accuracy to reach (0.8)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--json", type=Path, help="accuracies and weights of all epochs of every run")
    parser.add_argument("--document", type=Path, help="write the table into its section 'averaging'")
    return parser


def fractions(condition: str, ranks: int, ratio: float) -> list[float]:
    """Return the shards' parts of the training images."""
    sizes = [ratio**index if condition == "unequal" else 1.0 for index in range(ranks)]
    return [size / sum(sizes) for size in sizes]


def add_noise(path: Path, noise: float, parts: Sequence[float], count: int, seed: int) -> None:
    """Draw the labels of some images of one shard anew, in a copy of the built-in training images.

    Parameters
    ----------
    path : Path
        The copy; changed in place.
    noise : float
        Probability that a label is drawn anew, from all classes.
    parts : sequence of float
        The shards' parts.
    count : int
        Held-out images; their labels stay right.
    seed : int
        Of the run, by which it draws its shards.
    """
    import h5py

    with h5py.File(path, "r+") as file:
        labels = file["labels"][:]
        rows, _ = held_out(len(labels), count, seed)
        shard = shards(rows, parts, seed)[NOISY_SHARD]
        draw = np.random.default_rng([seed, 80])
        wrong = shard[draw.random(len(shard)) < noise]
        labels[wrong] = draw.integers(0, len(file.attrs["class_names"]), len(wrong))
        file["labels"][:] = labels


def run(args: argparse.Namespace, condition: str, rule: str, seed: int) -> dict[str, Any]:
    """Return accuracies, weights and distances of the epochs of one training."""
    parts = fractions(condition, args.ranks, args.ratio)
    built_in = resources.files("hpcnn.data") / "builtin"
    settings = [f"average.rule={rule}", f"train.seed={seed}", "log.evaluate_every_epochs=1"]
    settings += [f"average.validation_samples={args.held_out}", f"average.shards={parts}"]
    with tempfile.TemporaryDirectory(prefix="experiment-") as folder:
        if condition == "noisy":
            images = Path(folder) / "train.h5"
            shutil.copyfile(str(built_in / "fashion-mini-train.h5"), images)
            add_noise(images, args.noise, parts, args.held_out, seed)
            settings += [f"data.source={images}", f"data.test={built_in / 'fashion-mini-test.h5'}"]
        records = train(args.ranks, args.preset, [*settings, *args.set])
    averages = [record for record in records if record["event"] == "average" and record["lasting"]]
    return {
        "condition": condition,
        "rule": rule,
        "seed": seed,
        "accuracies": [record["test_accuracy"] for record in records if record["event"] == "epoch"],
        "weights": [record["weights"] for record in averages],
        "consensus": [record["consensus"] for record in averages],
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all runs; one network sees all images, whatever the sizes of shards."""
    found = []
    for condition, rule, seed in product(args.conditions, args.rules, args.seeds):
        if (condition, rule) != ("unequal", "none"):
            found.append(run(args, condition, rule, seed))
            print(f"{condition} {rule} {seed}: {found[-1]['accuracies'][-1]:.4f}", flush=True)
    return found


def epochs_to(accuracies: Sequence[float], target: float) -> int | None:
    """Return the first epoch, from 1, that reached an accuracy."""
    return next((epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy >= target), None)


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def report(args: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> str:
    """Return the table and the line under it."""
    rows = [["rule", *[f"{condition}: {what}" for condition in args.conditions for what in ("epochs", "accuracy")]]]
    for rule in args.rules:
        row = [rule]
        for condition in args.conditions:
            runs = [one["accuracies"] for one in found if (one["condition"], one["rule"]) == (condition, rule)]
            if not runs:
                row += ["", ""]
                continue
            reached = [epochs_to(one, args.target) for one in runs]
            number = [epochs for epochs in reached if epochs is not None]
            row.append(spread(number, 1) if len(number) == len(runs) else f"{len(number)} of {len(runs)}")
            row.append(spread([one[-1] for one in runs], 4))
        rows.append(row)
    return (
        f"{training.table(rows)}\n\nEpochs until {args.target:.0%} on the test images (or how many runs came that far),"
        f" accuracy in the end; mean ± standard deviation of {len(args.seeds)} seeds. {args.preset}, {args.ranks}"
        f" replicas, {len(found[0]['accuracies'])} epochs; noisy: {args.noise:.0%} of one shard's labels drawn anew;"
        f" unequal: shards of {', '.join(f'{part:.0%}' for part in fractions('unequal', args.ranks, args.ratio))}."
        f" {training.machine()}; {datetime.now(UTC):%Y-%m-%d}."
    )


def main() -> int:
    """Train and report; errors are one line."""
    return training.study("experiment_averaging", make_parser().parse_args(), measure, report, "averaging")


if __name__ == "__main__":
    sys.exit(main())
