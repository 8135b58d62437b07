#!/usr/bin/env python3
"""Time training steps of AlexNet on virtual hosts: PyTorch's DDP (gloo) beside hpcnn's exchanges. Run as root.

All contenders train the same network (61 million parameters, images of 227 x 227, 1000 classes, dropout as published,
SGD with momentum) at the same global batch with one thread a host, and take turns on the same hosts: a slow quarter of
an hour of the machine falls on all. The table has medians over the settled steps of all rounds.

    sudo -E scripts/bench_ddp.py --hosts 4 --cpu 0.45 --rate 1gbit 100mbit --document docs/benchmarks.md

An exchange is named by its settings, a key without a section being one of `exchange`:
`--exchange kind=allreduce,overlap=false kind=factors plan.preset=hybrid,algorithm=butterfly`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from virtual import training
from virtual.cluster import Cluster
from virtual.shape import ClusterError

DDP = "PyTorch DDP"
EXCHANGES = ["kind=allreduce,overlap=false", "kind=allreduce", "kind=sharded", "kind=factors", "kind=auto"]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4, metavar="N")
    parser.add_argument("--cpu", type=float, default=0.45, help="cores' worth of processor time of each host (0.45)")
    parser.add_argument("--memory", help="of each host; left out, no limit")
    parser.add_argument("--rate", nargs="+", default=["1gbit", "100mbit"], help="of the links, in turn")
    parser.add_argument("--exchange", nargs="*", default=EXCHANGES, metavar="KEY=VALUE,...")
    parser.add_argument("--no-ddp", action="store_true", help="leave PyTorch out")
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7, help="of each contender in each round (7)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contender (2)")
    parser.add_argument("--limit", type=float, default=1800.0, metavar="S", help="longest turn in seconds (1800)")
    parser.add_argument("--out", type=Path, default=Path("bench_ddp.json"), help="every step, as JSON")
    parser.add_argument("--document", type=Path, help="write the table into its section 'ddp'")
    return parser


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    """Return the steps by rate and contender."""
    begin = time.monotonic()
    contenders = ([] if args.no_ddp else [DDP]) + args.exchange
    sizes = {"steps": args.steps, "global_batch": args.global_batch, "limit_s": args.limit}
    steps: dict[str, dict[str, list[Any]]] = {}
    for rate in args.rate:
        steps[rate] = defaultdict(list)
        with Cluster(args.hosts, rate=rate, cpu=args.cpu, memory=args.memory, name="ddp") as cluster:
            for turn in range(args.rounds):
                for name in contenders:
                    if name == DDP:
                        new = training.train_ddp(cluster, **sizes)
                    else:
                        settings = training.ALEXNET | training.settings_of(name)
                        new = training.train_hpcnn(cluster, "alexnet", settings, **sizes)
                    steps[rate][name] += new
                    step_s = training.summary(new)["step_s"]
                    since = time.monotonic() - begin
                    print(f"{since:5.0f} s  {rate}  round {turn + 1}  {name}: {step_s:.2f} s a step", flush=True)
                    save(args, steps)
    return steps


def save(args: argparse.Namespace, steps: dict[str, dict[str, list[Any]]]) -> None:
    """Write all that is known, after every turn: a long run may be cut short."""
    about = {key: str(value) for key, value in vars(args).items()} | {"machine": training.machine()}
    args.out.write_text(json.dumps({"about": about, "steps": steps}, indent=1) + "\n")


def report(args: argparse.Namespace, steps: dict[str, dict[str, list[Any]]]) -> str:
    """Return the tables and the line under them."""
    parts = []
    for rate, contenders in steps.items():
        rows = [["", "s a step", "fastest", "speed-up", "compute s", "exposed s", "hidden s", "MB sent a step"]]
        base = training.summary(contenders[DDP])["step_s"] if DDP in contenders else None
        for name, records in contenders.items():
            numbers = training.summary(records)
            times = [f"{numbers['step_s']:.2f}", f"{numbers['fastest_s']:.2f}"]
            speedup = "" if base is None else f"{base / numbers['step_s']:.2f}"
            phases = [numbers.get(key) for key in ("compute_s", "exposed_comm_s", "hidden_comm_s")]
            shown = ["" if phase is None else f"{phase:.2f}" for phase in phases]
            label = name if name == DDP else f"hpcnn, {name.replace(',', ', ')}"
            rows.append([label, *times, speedup, *shown, f"{numbers['bytes_sent'] / 1e6:.0f}"])
        parts.append(f"{args.hosts} hosts of {args.cpu:g} cores, links of {rate}:\n\n{training.table(rows)}")
    counted = training.SETTLING_STEPS
    parts.append(
        f"{training.machine()}; {datetime.now(UTC):%Y-%m-%d}. Global batch {args.global_batch}, {args.rounds} rounds of"
        f" {args.steps} steps, the first {counted} of each not counted. Hosts are namespaces of one machine"
        " (`scripts/virtual_cluster.py`). PyTorch's bytes are those of rank 0's link, hpcnn's those of its messages."
    )
    return "\n\n".join(parts)


def main() -> int:
    """Measure and report; errors are one line."""
    args = make_parser().parse_args()

    def work() -> str:
        if args.steps <= training.SETTLING_STEPS:
            raise ClusterError(f"steps (={args.steps}) must be more than the {training.SETTLING_STEPS} not counted.")
        for name in args.exchange:
            training.settings_of(name)
        if not args.no_ddp and importlib.util.find_spec("torch") is None:
            raise ClusterError(f"{sys.executable} has no PyTorch. `pip install torch`, or give --no-ddp.")
        return report(args, measure(args))

    return training.finish("bench_ddp", work, args.document, "ddp")


if __name__ == "__main__":
    sys.exit(main())
