#!/usr/bin/env python3
"""Time how much of hpcnn's communication hides behind its computation, on virtual hosts. Run as root.

Runs `hpcnn bench overlap` for every exchange and every speed of the links: steps as they are trained, in turns with the
same steps without messages and with the same messages alone.

    sudo -E scripts/bench_overlap.py vgg16-32 --hosts 4 --cpu 0.45 --rate 1gbit 100mbit --global-batch 64
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from virtual import training
from virtual.cluster import Cluster

EXCHANGES = ["overlap=false", "wait=step", "wait=layer", "kind=sharded,overlap=false", "kind=sharded"]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="alexnet", help="the model and its recipe (alexnet)")
    parser.add_argument("--hosts", type=int, default=4, metavar="N")
    parser.add_argument("--ppn", type=int, default=1, metavar="K", help="ranks on each host (1)")
    parser.add_argument("--cpu", type=float, default=0.45, help="cores' worth of processor time of each host (0.45)")
    parser.add_argument("--rate", nargs="+", default=["1gbit", "100mbit"], help="of the links, in turn")
    parser.add_argument("--exchange", nargs="+", default=EXCHANGES, metavar="KEY=VALUE,...")
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="in a row (4)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each exchange (3)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--limit", type=float, default=1800.0, metavar="S", help="longest run in seconds (1800)")
    parser.add_argument("--out", type=Path, default=Path("bench_overlap.json"), help="every step, as JSON")
    parser.add_argument("--document", type=Path, help="write the table into its section 'overlap'")
    return parser


def measure(args: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what `hpcnn bench overlap` found, by rate and exchange."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for rate in args.rate:
        found[rate] = {}
        with Cluster(args.hosts, rate=rate, cpu=args.cpu, name="overlap") as cluster:
            for name in args.exchange:
                settings = {"data.source": "synthetic", "data.num_samples": str(args.global_batch)}
                settings |= {"train.global_batch": str(args.global_batch)} | training.settings_of(name)
                found[rate][name] = one = run(cluster, args, settings)
                print(f"{rate}  {name}: {one['step_s']:.3f} s a step", flush=True)
                about = {key: str(value) for key, value in vars(args).items()} | {"machine": training.machine()}
                args.out.write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n")
    return found


def run(cluster: Cluster, args: argparse.Namespace, settings: dict[str, str]) -> dict[str, Any]:
    """Return the result of one run."""
    words = [*(f"{key}={value}" for key, value in settings.items()), *args.set]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = ["bench", "overlap", args.preset, "--json", f"{folder}/found.json"]
        command += ["--steps", str(args.steps), "--repeats", str(args.repeats)]
        command += [word for setting in words for word in ("--set", setting)]
        training.run_hpcnn(cluster, command, ppn=args.ppn, limit_s=args.limit)
        return dict(json.loads(Path(folder, "found.json").read_text())["results"][0])


def report(args: argparse.Namespace, found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the tables and the line under them."""
    parts = []
    for rate, exchanges in found.items():
        head = ["exchange", "compute alone, ms", "messages alone, ms", "step, ms", "step / longer", "hidden", "MB sent"]
        rows = [head]
        for name, one in exchanges.items():
            times = (f"{1e3 * one[key]:.0f}" for key in ("compute_s", "comm_s", "step_s"))
            shares = (f"{one['over_longer']:.2f}", f"{one['hidden_share']:.0%}", f"{one['num_bytes'] / 1e6:.1f}")
            rows.append([name, *times, *shares])
        parts.append(
            f"{args.preset}, {args.hosts} hosts of {args.cpu:g} cores, links of {rate}:\n\n{training.table(rows)}"
        )
    parts.append(
        f"{training.machine()}; {datetime.now(UTC):%Y-%m-%d}. Global batch {args.global_batch}, {args.ppn} rank(s) a"
        f" host; medians of {args.repeats} times {args.steps} steps on the slowest rank. Hosts are namespaces of one"
        " machine (`scripts/virtual_cluster.py`)."
    )
    return "\n\n".join(parts)


def main() -> int:
    """Measure and report; errors are one line."""
    args = make_parser().parse_args()

    def work() -> str:
        for name in args.exchange:
            training.settings_of(name)
        return report(args, measure(args))

    return training.finish("bench_overlap", work, args.document, "overlap")


if __name__ == "__main__":
    sys.exit(main())
