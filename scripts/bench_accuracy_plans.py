#!/usr/bin/env python3
"""Train a network to the end by its recipe, serially and split over ranks of this host, and compare what comes out.

    scripts/bench_accuracy_plans.py lenet5 --ranks 2 4 --algorithm butterfly ring halving-doubling mpi

All runs start from the same weights and see the same batches; what differs is the order of sums. The table has the
accuracy and the loss on the test images, and how far the training loss of any epoch is from that of the serial run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from virtual import training
from virtual.launch import find_launcher

ALGORITHMS = ["butterfly", "ring", "halving-doubling", "mpi"]
HEAD = ["", "ranks", "test accuracy", "test loss", "largest difference of an epoch's loss"]

Record = Mapping[str, Any]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="lenet5", help="preset or TOML file (lenet5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="in turn (2 4)")
    parser.add_argument("--plan", nargs="+", default=["preset=hybrid"], metavar="KEY=VALUE,...")
    parser.add_argument("--algorithm", nargs="+", default=ALGORITHMS, help=f"in turn ({' '.join(ALGORITHMS)})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--json", type=Path, help="accuracy, loss and losses of all epochs of every run")
    parser.add_argument("--document", type=Path, help="write the table into its section 'accuracy-plans'")
    return parser


def train(ranks: int, preset: str, settings: Sequence[str]) -> list[Record]:
    """Return the records of one run on this host, one thread a rank; of one rank without a launcher.

    Raises
    ------
    ClusterError
        With the end of what the run said, if it fails.
    """
    launcher = [] if ranks == 1 else [find_launcher("auto")[1], "-n", str(ranks)]
    sets = [word for setting in ("checkpoint.every_epochs=0", *settings) for word in ("--set", setting)]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, open(f"{folder}/log", "w+") as log:
        command = [*launcher, sys.executable, "-m", "hpcnn", "train", preset, *sets, "--out", f"{folder}/run"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(training.ROOT)}
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        training.check(done.returncode, "hpcnn train", log)
        return [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]


def result(records: Sequence[Record]) -> dict[str, Any]:
    """Return test accuracy and loss at the end of a run, and the mean training loss of each epoch."""
    losses = defaultdict(list)
    for record in records:
        if record["event"] == "step":
            losses[record["epoch"]].append(record["loss"])
    means = [sum(steps) / len(steps) for _, steps in sorted(losses.items())]
    return {name: records[-1][name] for name in ("test_accuracy", "test_loss")} | {"epoch_losses": means}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what came out of every run, the serial one first."""
    runs = [("serial", 1, [])]
    for plan, algorithm, ranks in product(args.plan, args.algorithm, args.ranks):
        settings = training.settings_of(plan, "plan") | {"exchange.algorithm": algorithm}
        runs.append((f"{plan}, {algorithm}", ranks, [f"{key}={value}" for key, value in settings.items()]))
    found = []
    for name, ranks, settings in runs:
        found.append({"name": name, "ranks": ranks} | result(train(ranks, args.preset, [*args.set, *settings])))
        print(" ".join(_row(found[-1], found[0])), flush=True)
    return found


def difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference of two runs' losses."""
    return max(abs(loss - other) / other for loss, other in zip(losses, expected, strict=True))


def report(args: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> str:
    """Return the table and the line under it."""
    rows = [_row(run, found[0]) for run in found]
    epochs = len(found[0]["epoch_losses"])
    return (
        f"{training.table([HEAD, *rows])}\n\n{training.machine()}; {datetime.now(UTC):%Y-%m-%d}. {args.preset},"
        f" {epochs} epochs, one thread a rank; the same weights, batches and rates in all runs."
    )


def _row(run: Mapping[str, Any], serial: Mapping[str, Any]) -> list[str]:
    scores = [f"{run['test_accuracy']:.4f}", f"{run['test_loss']:.4f}"]
    away = "" if run is serial else f"{difference(run['epoch_losses'], serial['epoch_losses']):.1e}"
    return [run["name"], str(run["ranks"]), *scores, away]


def main() -> int:
    """Train and report; errors are one line."""
    return training.study("bench_accuracy_plans", make_parser().parse_args(), measure, report, "accuracy-plans")


if __name__ == "__main__":
    sys.exit(main())
