#!/usr/bin/env python3
"""Time how much of hpcnn's communication hides behind its computation, on virtual hosts. Run as root.

Every exchange takes turns with the others on the same hosts; a row has the medians over all settled steps. "alone" is
how long the messages of a step would take if the links had nothing else to do and the hosts lost no time.

    sudo -E scripts/bench_overlap.py resnet50 --hosts 4 --cpu 0.45 --rate 1gbit 100mbit --global-batch 32
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from virtual import training
from virtual.cluster import Cluster
from virtual.shape import SPEEDS, ClusterError, parse

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
    parser.add_argument("--steps", type=int, default=7, help="of each exchange in each round (7)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each exchange (2)")
    parser.add_argument("--limit", type=float, default=1800.0, metavar="S", help="longest turn in seconds (1800)")
    parser.add_argument("--out", type=Path, default=Path("bench_overlap.json"), help="every step, as JSON")
    parser.add_argument("--document", type=Path, help="write the table into its section 'overlap'")
    return parser


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    """Return the steps by rate and exchange."""
    begin = time.monotonic()
    steps: dict[str, dict[str, list[Any]]] = {}
    sizes = {"steps": args.steps, "global_batch": args.global_batch, "ppn": args.ppn, "limit_s": args.limit}
    for rate in args.rate:
        steps[rate] = defaultdict(list)
        with Cluster(args.hosts, rate=rate, cpu=args.cpu, name="overlap") as cluster:
            for turn in range(args.rounds):
                for name in args.exchange:
                    new = training.train_hpcnn(cluster, args.preset, training.exchange_settings(name), **sizes)
                    steps[rate][name] += new
                    step_s = training.summary(new)["step_s"]
                    since = time.monotonic() - begin
                    print(f"{since:5.0f} s  {rate}  round {turn + 1}  {name}: {step_s:.3f} s a step", flush=True)
                    about = {key: str(value) for key, value in vars(args).items()} | {"machine": training.machine()}
                    args.out.write_text(json.dumps({"about": about, "steps": steps}, indent=1) + "\n")
    return steps


def report(args: argparse.Namespace, steps: dict[str, dict[str, list[Any]]]) -> str:
    """Return the tables and the line under them."""
    parts = []
    for rate, exchanges in steps.items():
        rows = [["exchange", "ms a step", "fastest", "compute", "exposed", "hidden", "of all hidden", "alone"]]
        for name, records in exchanges.items():
            numbers = training.summary(records)
            exposed, hidden = numbers["exposed_comm_s"], numbers["hidden_comm_s"]
            alone = 8.0 * args.ppn * numbers["bytes_sent"] / parse("rate", rate, SPEEDS)
            times = (numbers["step_s"], numbers["fastest_s"], numbers["compute_s"], exposed, hidden)
            share = f"{hidden / (hidden + exposed):.0%}" if hidden + exposed else ""
            rows.append([name, *(f"{1e3 * value:.0f}" for value in times), share, f"{1e3 * alone:.0f}"])
        parts.append(
            f"{args.preset}, {args.hosts} hosts of {args.cpu:g} cores, links of {rate}:\n\n{training.table(rows)}"
        )
    counted = training.SETTLING_STEPS
    parts.append(
        f"{training.machine()}; {datetime.now(UTC):%Y-%m-%d}. Global batch {args.global_batch}, {args.ppn} rank(s) a"
        f" host, {args.rounds} rounds of {args.steps} steps, the first {counted} of each not counted. Hosts are"
        " namespaces of one machine (`scripts/virtual_cluster.py`)."
    )
    return "\n\n".join(parts)


def main() -> int:
    """Measure and report; errors are one line."""
    args = make_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if args.steps <= training.SETTLING_STEPS:
            raise ClusterError(f"steps (={args.steps}) must be more than the {training.SETTLING_STEPS} not counted.")
        for name in args.exchange:
            training.exchange_settings(name)
        text = report(args, measure(args))
        print(f"\n{text}")
        if args.document:
            training.write_section(args.document, "overlap", text)
    except ClusterError as error:
        print(f"bench_overlap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
