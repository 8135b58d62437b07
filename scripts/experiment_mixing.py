#!/usr/bin/env python3
"""Compare butterfly mixing with exact sums of gradients, and with averages of all replicas now and then.

    scripts/experiment_mixing.py --ranks 4 --seeds 1 2 3 --document docs/experiments.md

Four ways to train by a preset's recipe: a butterfly all-reduce of gradients in every step; one stage of a butterfly on
the parameters after every step; an average of all replicas whenever mixing has gone through all stages; and replicas
that are averaged only to be measured. The table has the accuracy on the test images, how far replicas were from their
average when they were measured, and what rank 0 sends in a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from bench_accuracy_plans import train
from experiment_averaging import spread
from virtual import training

from hpcnn.plan.schedules import num_stages

HEAD = ["", "test accuracy", "distance of replicas", "bytes a step", "messages a step", "step, ms"]
NEVER = 1 << 30


def make_parser(description: str | None = __doc__, preset: str = "lenet5-mixing") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default=preset, help="preset or TOML file (%(default)s)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="ranks of a run (4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED", help="repeats (1 2 3)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--json", type=Path, help="what every run came to")
    parser.add_argument("--document", type=Path, help="write the table into its section")
    return parser


def ways(ranks: int) -> dict[str, list[str]]:
    """Return the settings of every way to train."""
    stages = num_stages(ranks)
    butterfly = "exchange.algorithm=butterfly"
    return {
        "all-reduce of gradients": ["average.rule=none", butterfly],
        "butterfly mixing": ["average.rule=mixing", butterfly],
        f"average every {stages} steps": ["average.rule=equal", f"average.every_steps={stages}", butterfly],
        "replicas alone": ["average.rule=equal", f"average.every_steps={NEVER}", butterfly],
    }


def result(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return accuracy, distance, and what a step sends, with the median of its time."""
    steps = [record for record in records if record["event"] == "step"]
    distances = [record["consensus"] for record in records if record["event"] == "average"]
    return {
        "accuracy": records[-1]["test_accuracy"],
        "distance": statistics.fmean(distances) if distances else 0.0,
        "bytes": statistics.fmean(record["bytes_sent"] for record in steps[:-1]),  # the last one ends with an average
        "messages": statistics.fmean(record["messages_sent"] for record in steps[:-1]),
        "step_s": statistics.median(record["step_s"] for record in steps),
    }


def measure(args: argparse.Namespace, ways: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Return what came out of all runs, by every way to train."""
    found = []
    for name, settings in ways.items():
        for seed in args.seeds:
            records = train(args.ranks, args.preset, [*settings, f"train.seed={seed}", *args.set])
            found.append({"name": name, "seed": seed} | result(records))
            print(f"{name} {seed}: {found[-1]['accuracy']:.4f}", flush=True)
    return found


def report(args: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> str:
    """Return the table and the line under it."""
    rows = [HEAD]
    for name in dict.fromkeys(one["name"] for one in found):
        runs = [one for one in found if one["name"] == name]
        columns = {key: [one[key] for one in runs] for key in ("accuracy", "distance", "bytes", "messages", "step_s")}
        rows.append(
            [
                name,
                spread(columns["accuracy"], 4),
                spread(columns["distance"], 4),
                f"{statistics.fmean(columns['bytes']):.0f}",
                f"{statistics.fmean(columns['messages']):.1f}",
                f"{1e3 * statistics.median(columns['step_s']):.1f}",
            ]
        )
    return (
        f"{training.table(rows)}\n\nMean ± standard deviation of {len(args.seeds)} seeds; {args.preset}, {args.ranks}"
        f" ranks. Distances are relative to the length of all parameters, and are of the ends of epochs."
        f" {training.machine()}; {datetime.now(UTC):%Y-%m-%d}."
    )


def main() -> int:
    """Train and report; errors are one line."""
    args = make_parser().parse_args()
    return training.study("experiment_mixing", args, lambda args: measure(args, ways(args.ranks)), report, "mixing")


if __name__ == "__main__":
    sys.exit(main())
