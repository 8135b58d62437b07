#!/usr/bin/env python3
"""Time `hpcnn train` under several plans and exchanges on growing numbers of virtual hosts. Run as root.

Every point is a run of its own: hosts, links, batch, plan and exchange. Points take turns in as many rounds as asked
for, and the table has the medians of their settled steps. A plan that refuses a batch or a number of hosts is named
below the table with its reason.

    sudo -E scripts/bench_plans.py yolo16 --hosts 1 2 4 6 --cpu 0.1 --rate 100mbit --batch 1 4 \\
        --plan preset=spatial preset=tiled-groups file=plan-{hosts}.toml --exchange kind=sharded --machine profile

With `--machine profile` the hosts are measured first, with the layers of the model, and every step is predicted too;
`preset=auto` is the plan that `hpcnn plan` finds for that machine.

A plan is named by its settings, a key without a section being one of `plan`, or by its file; an exchange likewise. In
names of files {hosts} and {rate} stand for those of the point.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from virtual import training
from virtual.cluster import Cluster
from virtual.shape import ClusterError

MEASURED = "profile"
HEAD = ["plan", "exchange", "batch", "hosts", "s a step", "fastest", "speed-up", "compute s", "exposed s"]
HEAD += ["MB sent a step", "memory MB", "beyond Python MB"]

Point = dict[str, Any]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="the model and its recipe, or a TOML file; it trains on synthetic images")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="in turn (1 2 4)")
    parser.add_argument("--ppn", type=int, default=1, metavar="K", help="ranks on each host (1)")
    parser.add_argument("--cpu", type=float, default=0.1, help="cores' worth of processor time of each host (0.1)")
    parser.add_argument("--memory", help="of each host; left out, no limit")
    parser.add_argument("--rate", nargs="+", default=["100mbit"], help="of the links, in turn (100mbit)")
    parser.add_argument("--plan", nargs="+", default=["preset=data"], metavar="KEY=VALUE,...")
    parser.add_argument("--exchange", nargs="+", default=["kind=allreduce"], metavar="KEY=VALUE,...")
    parser.add_argument("--batch", type=int, nargs="+", default=[128], help="global, in turn (128)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--steps", type=int, default=7, help="of each point in each round (7)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each point (1)")
    parser.add_argument("--machine", metavar="FILE", help=f"exchange.machine; '{MEASURED}': measure it on the hosts")
    parser.add_argument("--seconds", type=float, default=10.0, help="time of such a measurement's messages (10)")
    parser.add_argument("--layer-seconds", type=float, default=120.0, help="and of its layers, for each batch (120)")
    parser.add_argument("--limit", type=float, default=1800.0, metavar="S", help="longest run in seconds (1800)")
    parser.add_argument("--json", type=Path, default=Path("bench_plans.json"), help="every step, as JSON")
    parser.add_argument("--document", type=Path, help="write the tables into a section of this file")
    parser.add_argument("--section", default="plans", help="name of that section (plans)")
    return parser


def points(args: argparse.Namespace, rate: str, hosts: int) -> Iterator[Point]:
    """Yield what is measured on hosts of one number and one speed of links."""
    for batch, plan, exchange in product(args.batch, args.plan, args.exchange):
        yield {"rate": rate, "hosts": hosts, "batch": batch, "plan": plan, "exchange": exchange, "steps": []}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return all points, and the memory of a rank that does nothing."""
    found: dict[str, Any] = {"bare_memory_bytes": None, "points": []}
    for rate, hosts in product(args.rate, args.hosts):
        with Cluster(hosts, rate=rate, cpu=args.cpu, memory=args.memory, name="plans") as cluster:
            if found["bare_memory_bytes"] is None:
                found["bare_memory_bytes"] = training.bare_memory_bytes(cluster, limit_s=args.limit)
            machine = machine_file(cluster, args, rate, hosts)
            new = list(points(args, rate, hosts))
            found["points"] += new
            for turn, point in product(range(args.rounds), new):
                take(cluster, args, point, machine)
                name = f"{rate}  {hosts} hosts  batch {point['batch']}  {point['plan']}  {point['exchange']}"
                print(f"{name}  round {turn + 1}: {outcome(point)}", flush=True)
                save(args, found)
    return found


def machine_file(cluster: Cluster, args: argparse.Namespace, rate: str, hosts: int) -> Path | None:
    """Return the file that choices by time go by, measured on these hosts if asked for; it lies beside the results."""
    if args.machine != MEASURED:
        return place(args.machine, rate, hosts) if args.machine else None
    path = args.json.with_name(f"{args.json.stem}-{hosts}-{rate}.toml").resolve()
    words = ["profile", "--out", str(path), "--seconds", str(args.seconds), "--layer-seconds", str(args.layer_seconds)]
    words += ["--model", args.preset, "--set", "data.source=synthetic", "--batch", *map(str, args.batch)]
    words += [word for setting in args.set for word in ("--set", setting)]
    training.run_hpcnn(cluster, words, ppn=args.ppn, limit_s=args.limit)
    return path


def predict(args: argparse.Namespace, point: Point, settings: dict[str, str], plan: str | None) -> Path | None:
    """Add the predicted step to the point; return the plan to obey, which is looked for here if it is "auto"."""
    ranks, found = point["hosts"] * args.ppn, args.json.with_name(f"{args.json.stem}-predicted.json").resolve()
    words = ["plan", args.preset, "--ranks", str(ranks), "--ranks-per-node", str(args.ppn), "--json", str(found)]
    sets = {"data.source": "synthetic", "train.global_batch": str(point["batch"])} | settings
    words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    file = place(plan, point["rate"], point["hosts"]) if plan else None
    if file is not None:
        words += ["--plan", str(file)]
    elif settings.get("plan.preset") == "auto":
        name = f"{args.json.stem}-{point['hosts']}-{point['rate']}-{point['batch']}.plan.toml"
        file = args.json.with_name(name).resolve()
        words += ["--save", str(file)]
    point["table"] = training.run_here(words, limit_s=args.limit)
    point["predicted_s"] = json.loads(found.read_text())["step_s"]
    return file


def take(cluster: Cluster, args: argparse.Namespace, point: Point, machine: Path | None) -> None:
    """Train once and add what was found to the point; a refusal is kept as its reason."""
    settings = training.settings_of(point["plan"], "plan")
    plan = settings.pop("plan.file", None)
    settings |= training.settings_of(point["exchange"])
    settings |= {"exchange.machine": str(machine)} if machine else {}
    settings |= dict(setting.partition("=")[::2] for setting in args.set)
    try:
        file = place(plan, point["rate"], point["hosts"]) if plan else None
        if machine is not None:
            file = predict(args, point, settings, plan)
            if file is not None:
                settings.pop("plan.preset", None)
        run = training.train_hpcnn(
            cluster,
            args.preset,
            settings,
            steps=args.steps,
            global_batch=point["batch"],
            ppn=args.ppn,
            plan=file,
            limit_s=args.limit,
        )
    except ClusterError as error:
        point["failed"] = str(error)
        return
    point["steps"] += run.steps
    point["memory_bytes"] = max(point.get("memory_bytes", 0), run.end["peak_memory_bytes"])


def place(name: str, rate: str, hosts: int) -> Path:
    """Return the path of a file whose name may depend on the hosts."""
    return Path(name.replace("{hosts}", str(hosts)).replace("{rate}", rate)).resolve()


def outcome(point: Point) -> str:
    """Return what is known of a point, in few words."""
    return f"{training.summary(point['steps'])['step_s']:.3f} s a step" if point["steps"] else point["failed"]


def save(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write all that is known, after every run: a long measurement may be cut short."""
    about = {key: str(value) for key, value in vars(args).items()} | {"machine": training.machine()}
    args.json.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")


def report(args: argparse.Namespace, found: dict[str, Any]) -> str:
    """Return a table for every speed of the links, and the lines under it."""
    parts = []
    for rate in args.rate:
        here = [point for point in found["points"] if point["rate"] == rate]
        here.sort(key=lambda point: (args.plan.index(point["plan"]), args.exchange.index(point["exchange"])))
        here.sort(key=lambda point: args.batch.index(point["batch"]))
        bases: dict[tuple[Any, ...], Point] = {}
        for point in sorted((point for point in here if point["steps"]), key=lambda point: point["hosts"]):
            bases.setdefault(_contender(point), point)
        head = [*HEAD, "predicted s"] if any("predicted_s" in point for point in here) else HEAD
        measured = [point for point in here if point["steps"]]
        rows = [_row(point, bases[_contender(point)], found["bare_memory_bytes"])[: len(head)] for point in measured]
        lines = [f"{args.preset}, hosts of {args.cpu:g} cores, links of {rate}:", "", training.table([head, *rows])]
        lines += [
            f"\n{point['hosts']} hosts, batch {point['batch']}, {point['plan']}, {point['exchange']}: {point['failed']}"
            for point in here
            if "failed" in point
        ]
        parts.append("\n".join(lines))
    bare = found["bare_memory_bytes"] / 1e6
    parts.append(
        f"{training.machine()}; {datetime.now(UTC):%Y-%m-%d}. {args.rounds} round(s) of {args.steps} steps, the first"
        f" {training.SETTLING_STEPS} of each not counted; {args.ppn} rank(s) a host. Speed-up is over the fewest hosts"
        " of the same row; bytes are those of rank 0's messages; memory is the largest resident set of any rank, and"
        f" Python with hpcnn's libraries, before it has made anything, takes {bare:.0f} MB of it. Hosts are namespaces"
        " of one machine (`scripts/virtual_cluster.py`)."
    )
    return "\n\n".join(parts)


def _contender(point: Point) -> tuple[Any, ...]:
    return point["batch"], point["plan"], point["exchange"]


def _row(point: Point, base: Point, bare_bytes: int) -> list[str]:
    numbers, memory = training.summary(point["steps"]), point["memory_bytes"]
    speedup = training.summary(base["steps"])["step_s"] / numbers["step_s"]
    times = [f"{numbers[key]:.3f}" for key in ("step_s", "fastest_s")]
    phases = [f"{numbers[key]:.3f}" for key in ("compute_s", "exposed_comm_s")]
    sizes = [f"{value / 1e6:.{digits}f}" for value, digits in ((numbers["bytes_sent"], 2), (memory, 0))]
    sizes.append(f"{(memory - bare_bytes) / 1e6:.0f}")
    names = [point["plan"], point["exchange"], str(point["batch"]), str(point["hosts"])]
    predicted = (
        f"{point['predicted_s']:.3f} ({point['predicted_s'] / numbers['step_s'] - 1:+.0%})"
        if "predicted_s" in point
        else ""
    )
    return [*names, *times, f"{speedup:.2f}", *phases, *sizes, predicted]


def check(args: argparse.Namespace) -> None:
    """Raise ClusterError for what cannot be measured, before any host is made."""
    if args.steps <= training.SETTLING_STEPS:
        raise ClusterError(f"steps (={args.steps}) must be more than the {training.SETTLING_STEPS} not counted.")
    for name in args.exchange:
        training.settings_of(name)
    files = [training.settings_of(name, "plan").get("plan.file") for name in args.plan]
    files.append(None if args.machine == MEASURED else args.machine)
    for name, rate, hosts in product(files, args.rate, args.hosts):
        if name and not place(name, rate, hosts).is_file():
            raise ClusterError(f"'{place(name, rate, hosts)}' is no file. Make it for {hosts} hosts, or mend its name.")


def main() -> int:
    """Measure and report; errors are one line."""
    args = make_parser().parse_args()

    def work() -> str:
        check(args)
        return report(args, measure(args))

    return training.finish("bench_plans", work, args.document, args.section)


if __name__ == "__main__":
    sys.exit(main())
