#!/usr/bin/env python3
"""Measure strong scaling on virtual hosts, beside what is predicted from messages and layers timed on the same hosts.

For every rate and number of hosts, `hpcnn profile` measures the hosts; `hpcnn scale` then trains each model by each
plan. The table has seconds a step, the speed-up over one host, and by how much the prediction differs; the picture has
the speed-ups. What is in --out already is not measured again.

    scripts/bench_scaling.py --out runs/scaling --document docs/benchmarks.md --figure docs/figures/scaling.svg
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from virtual import training
from virtual.shape import ClusterError

from hpcnn.analysis.scaling_table import Summary, collect, summarise

MODELS = ["vgg16-32:6", "alexnet:5", "resnet20:16"]
PROFILED = ("data", "hybrid", "hybrid-rows")
Found = Mapping[tuple[str, str], Sequence[Summary]]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="PRESET:STEPS", help=f"({' '.join(MODELS)})")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="(1 2 4 8)")
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="of links (100mbit 1gbit)")
    parser.add_argument("--cpu", type=float, default=0.2, metavar="CORES", help="of a host (0.2)")
    parser.add_argument("--plans", default="data,hybrid,auto", help="(data,hybrid,auto)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each point (1)")
    parser.add_argument("--layer-seconds", type=float, default=45.0, help="for the layers of a model (45)")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="machine files and studies")
    parser.add_argument("--document", type=Path, help="write the table into its section 'strong-scaling'")
    parser.add_argument("--figure", type=Path, help="draw the speed-ups into this file")
    return parser


def measure(args: argparse.Namespace) -> Found:
    """Return the summaries of every rate and model, after measuring what is missing."""
    models = dict(name.split(":") for name in args.models)
    for rate in args.rates:
        home = (args.out / rate).resolve()
        home.mkdir(parents=True, exist_ok=True)
        cluster = [sys.executable, str(training.ROOT / "scripts" / "virtual_cluster.py"), "run"]
        shape = ["--rate", rate, "--cpu", str(args.cpu), "--"]
        hpcnn = [sys.executable, "-m", "hpcnn"]
        for hosts in args.hosts:
            if not (home / f"machine-{hosts}.toml").exists():
                words = [word for model in models for word in ("--model", model)]
                words += ["--preset", *PROFILED, "--layer-seconds", str(args.layer_seconds)]
                words += ["--seconds", "8", "--max-bytes", str(16 << 20), "--out", str(home / f"machine-{hosts}.toml")]
                run([*cluster, str(hosts), *shape, *hpcnn, "profile", *words], home / "profile.log")
        for model, steps in models.items():
            words = ["--ranks", ",".join(map(str, args.hosts)), "--plans", args.plans, "--exchanges", "auto"]
            words += ["--repeats", str(args.repeats), "--steps", steps, "--set", "data.num_samples=1280"]
            words += ["--machine", str(home / "machine-{ranks}.toml"), "--out", str(home / model)]
            words += ["--launcher", shlex.join([*cluster, "{hosts}", *shape])]
            run([*hpcnn, "scale", model, *words], home / f"{model}.log")
    return {
        (rate, model): summarise(collect(args.out / rate / model), "strong") for rate in args.rates for model in models
    }


def run(command: Sequence[str], log: Path) -> None:
    """Run a command; raises ClusterError with the end of what it said, if it fails."""
    print(f"{datetime.now(UTC):%H:%M:%S} {shlex.join(command)}", flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(training.ROOT)}
    with log.open("w+") as said:
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False)
        training.check(done.returncode, log.stem, said)


def error(one: Summary) -> float:
    """Return by how much the prediction differs, in parts of what was measured."""
    return (one.predicted_step_s or one.step_s.value) / one.step_s.value - 1.0


def report(args: argparse.Namespace, found: Found) -> str:
    """Return the table and the lines under it, and draw the picture."""
    plans = args.plans.split(",")
    rows = [["network", "links", "hosts", *(f"{plan}: s (speed-up, prediction)" for plan in plans)]]
    for (rate, model), summaries in found.items():
        cells = {(one.ranks, one.plan): one for one in summaries}
        for hosts in args.hosts:
            row = [model, rate, str(hosts)]
            for plan in plans:
                one = cells.get((hosts, plan))
                text = f"{one.step_s.value:.3g} ({one.speedup.value:.2f}, {100 * error(one):+.0f} %)" if one else ""
                row.append(text)
            rows.append(row)
    errors = [abs(error(one)) for summaries in found.values() for one in summaries]
    if args.figure:
        draw(args, found)
    runs = "one run" if args.repeats == 1 else f"{args.repeats} runs"
    median, most, far = statistics.median(errors), max(errors), sum(one > 0.2 for one in errors)
    return (
        f"{training.table(rows)}\n\nHosts of {args.cpu} cores, one rank and thread each; batches of 128; the median"
        f" step of {runs}, without the first {training.SETTLING_STEPS}. Predictions are {median:.0%} off in the median,"
        f" by {most:.0%} at most; {far} of {len(errors)} by more than 20 %. {training.machine()};"
        f" {datetime.now(UTC):%Y-%m-%d}."
    )


def draw(args: argparse.Namespace, found: Found) -> None:
    """Draw speed-ups beside the ideal and the prediction, a row for each rate and a column for each model."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ClusterError("the picture needs matplotlib; pip install 'hpcnn[plots]'.") from None
    models = list(dict.fromkeys(model for _, model in found))
    size = (3.6 * len(models), 3.2 * len(args.rates))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(args.rates), len(models), sharex=True, sharey=True, squeeze=False)
    for (rate, model), summaries in found.items():
        axes = grid[args.rates.index(rate)][models.index(model)]
        axes.plot(args.hosts, args.hosts, color="gray", linewidth=1, label="ideal")
        base = summaries[0]
        for number, plan in enumerate(args.plans.split(",")):
            line = [base, *(one for one in summaries if one.plan == plan and one is not base)]
            color, ranks = f"C{number}", [one.ranks for one in line]
            axes.plot(ranks, [one.speedup.value for one in line], "o-", color=color, markersize=3, label=plan)
            axes.plot(ranks, [one.predicted_speedup for one in line], "--", color=color, linewidth=1)
        axes.plot([], [], "k--", linewidth=1, label="predicted")
        axes.set(title=f"{model}, {rate}", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(args.hosts, labels=map(str, args.hosts))
            axis.set_ticks([], minor=True)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("hosts")
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up")
    grid[0][0].legend(fontsize="small")
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, metadata={"Date": None})


def main() -> int:
    """Measure and report; errors are one line."""
    args = make_parser().parse_args()
    return training.finish("bench_scaling", lambda: report(args, measure(args)), args.document, "strong-scaling")


if __name__ == "__main__":
    sys.exit(main())
