#!/usr/bin/env python3
"""Measure what the information plane costs a training: LeNet-5 with and without it, on one process of one thread.

The cases are trained in turn, --repeats times; the table has medians, and in brackets the least and the most over the
repeats, each in parts of the run without analysis beside it. "elapsed" is what a user waits; "training thread" and
"process" are processor time, without and with the thread that finds eigenvalues beside the training.

    scripts/bench_analysis.py --repeats 7 --document docs/experiments.md
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before anything counts processors
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

import numpy as np
from virtual import training

from hpcnn import configuration
from hpcnn.analysis.information_plane import InformationPlane
from hpcnn.analysis.scaling import QUIET
from hpcnn.comm import start
from hpcnn.train.setup import assemble
from hpcnn.train.trainer import Trainer

CASES: Mapping[str, Sequence[str]] = {
    "the defaults": (),
    "`errors = true`": ("analysis.errors=true",),
    "`alpha = 1.01`": ("analysis.alpha=1.01",),
    "`alpha = 1.01`, `errors = true`": ("analysis.alpha=1.01", "analysis.errors=true"),
}
TIMES = ("elapsed", "training thread", "process")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="of every case, in turn (7)")
    parser.add_argument("--steps", type=int, default=600, help="of a run (600)")
    parser.add_argument("--every", type=int, default=50, help="steps from one measurement to the next (50)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--document", type=Path, help="write the table into its section 'analysis'")
    return parser


def seconds(settings: Sequence[str]) -> np.ndarray:
    """Return what one run takes, in the order of `TIMES`."""
    parts = assemble(configuration.load("lenet5", [*QUIET, "log.every_seconds=0", *settings]), start())
    observers = [InformationPlane(parts)] if parts.config.analysis.information_plane_every_steps else []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        streams = {"progress_stream": io.StringIO(), "result_stream": io.StringIO()}
        trainer = Trainer(parts, Path(folder) / "run", observers=observers, **streams)
        trainer.prepare()
        clocks = (time.perf_counter, time.thread_time, time.process_time)
        begin = [clock() for clock in clocks]
        trainer.train()
        return np.array([clock() - since for clock, since in zip(clocks, begin, strict=True)])


def measure(args: argparse.Namespace) -> str:
    """Return the table, and the line under it."""
    common = [f"train.steps={args.steps}", *args.set]
    plain, ratios = [], {name: [] for name in CASES}
    seconds([*common, "train.steps=20"])  # what is made and read once
    for repeat in range(args.repeats):
        plain.append(seconds(common))
        for name, settings in CASES.items():
            every = f"analysis.information_plane_every_steps={args.every}"
            ratios[name].append(seconds([*common, every, *settings]) / plain[-1])
        print(f"{repeat + 1}/{args.repeats}: {plain[-1][0]:.2f} s without analysis", flush=True)
    rows = [["`[analysis]`", *TIMES], ["off", *(f"{value:.2f} s" for value in np.median(plain, axis=0))]]
    rows += [[name, *map(_cell, np.array(found).T)] for name, found in ratios.items()]
    return (
        f"{training.table(rows)}\n\n{training.machine()}; {datetime.now(UTC):%Y-%m-%d}. Medians and ranges of"
        f" {args.repeats} runs of {args.steps} steps of `lenet5`, one process of one thread, a measurement every"
        f" {args.every} steps."
    )


def _cell(ratios: np.ndarray) -> str:
    median, least, most = (100 * (value - 1) for value in (np.median(ratios), ratios.min(), ratios.max()))
    return f"{median:+.0f} % ({least:+.0f} to {most:+.0f})"


def main() -> int:
    """Measure and report; errors are one line."""
    args = make_parser().parse_args()
    return training.finish("bench_analysis", lambda: measure(args), args.document, "analysis")


if __name__ == "__main__":
    sys.exit(main())
