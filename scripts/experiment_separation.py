#!/usr/bin/env python3
"""Compare networks whose feature subspaces are kept apart with networks trained by cross entropy alone.

For each model and method some runs that differ in their seed: cross entropy; and the geodesic and the chordal
separation; and a network for each class by rejections. All are runs of `hpcnn train` and `hpcnn evaluate`:

    scripts/experiment_separation.py --models lenet5 resnet20 --epochs 10 --repeats 3 --ranks 2

It prints tables in Markdown; every number is the mean of the runs and their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("none", "geodesic", "chordal", "rejection")
NAMES = {"none": "cross entropy", "geodesic": "+ geodesic", "chordal": "+ chordal", "rejection": "one network a class"}
RECIPE = ("data.source=builtin", "train.global_batch=64", "train.lr=0.05", "train.base_batch=0")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet5", "resnet20"], help="presets, the smaller first")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the images of a run (10)")
    parser.add_argument("--steps", type=int, default=0, help="updates of every network, instead of epochs")
    parser.add_argument("--repeats", type=int, default=3, help="seeds (3)")
    parser.add_argument("--ranks", type=int, default=1, help="started with mpiexec, if more than one (1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    return parser


def settings(args: argparse.Namespace, method: str, seed: int) -> list[str]:
    """Return the overrides of one run; without a term the subspaces are followed all the same."""
    chosen = [*RECIPE, f"train.seed={100 * seed}"]  # the networks of classes add their number
    if args.steps:
        chosen += [f"train.steps={args.steps}", "train.warmup_epochs=0.2"]
    else:
        chosen.append(f"train.epochs={args.epochs}")
    if method == "none":
        chosen += ["separation.method=geodesic", "separation.weight=0"]
    elif method == "rejection":
        chosen += ["separation.method=rejection", "separation.weight=1", "separation.refresh=5"]
    else:
        chosen += [f"separation.method={method}", "separation.weight=10"]
    return [*chosen, "checkpoint.every_epochs=0", "log.evaluate_every_epochs=0", *args.set]


def hpcnn(ranks: int, *words: str) -> str:
    """Run a command of hpcnn on some ranks, and return what it printed; its complaints are shown."""
    launcher = ["mpiexec", "-n", str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, "-m", "hpcnn", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"experiment_separation: {' '.join(words)} failed.\n{done.stderr}")
    return done.stdout


def run(args: argparse.Namespace, model: str, method: str, seed: int) -> dict[str, Any]:
    """Train and evaluate once, and return the scores."""
    folder = Path(tempfile.mkdtemp(prefix="hpcnn-separation-"))
    try:
        overrides = [word for one in settings(args, method, seed) for word in ("--set", one)]
        hpcnn(args.ranks, "train", model, *overrides, "--out", str(folder / "run"))
        return json.loads(hpcnn(args.ranks, "evaluate", str(folder / "run"), "--json"))
    finally:
        shutil.rmtree(folder)


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean of some runs and their standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def row(model: str, method: str, scores: Sequence[dict[str, Any]]) -> str:
    """Return one line of the table; measures that a method lacks are left blank."""
    apart = [score.get("separation", score) for score in scores]
    cells = [spread([score["accuracy"] for score in scores], 3)]
    cells.append(spread([one["rejection_accuracy"] for one in apart], 3))
    for name in ("geodesic", "chordal"):
        cells.append(spread([one[name] for one in apart], 3) if name in apart[0] else "")
    angles = [mean_angle(one["angles"]) for one in apart if "angles" in one]
    cells.append(spread(angles, 1) if angles else "")
    return f"| {model} | {NAMES[method]} | {' | '.join(cells)} |"


def mean_angle(angles: list[list[float]]) -> float:
    """Return the mean of the smallest angles between two classes, in degrees."""
    pairs = [angle for index, one in enumerate(angles) for angle in one[:index]]
    return statistics.mean(pairs)


def main() -> None:
    args = make_parser().parse_args()
    print("| model | loss | accuracy | accuracy by rejection | geodesic | chordal | smallest angle of two classes |")
    print("|---|---|---|---|---|---|---|")
    for model in args.models:
        for method in args.methods:
            scores = [run(args, model, method, seed) for seed in range(1, args.repeats + 1)]
            print(row(model, method, scores), flush=True)


if __name__ == "__main__":
    main()
