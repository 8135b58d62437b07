"""`hpcnn simulate`: what training steps would take on machines with thousands of ranks; none is started."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from hpcnn import configuration
from hpcnn.analysis.forecast import model_of
from hpcnn.cli.manual import Manual, explain
from hpcnn.cli.table import format_table, quantity
from hpcnn.errors import DataError, PlanError
from hpcnn.plan.machine import load as load_machine
from hpcnn.plan.machine import named
from hpcnn.plan.simulation import ALGORITHMS, PLANS, Point, Series, Simulation, simulate

MANUAL = Manual(
    """Predicts steps of training on any numbers of ranks, from the plans, schedules and prices by which ranks would
    decide, on a machine that a file describes: links, ports that ranks share, switches or a torus, and rates of
    computation. Starts no ranks. Speed-up is by samples a second, over one core (or device) alone.""",
    examples=(
        ("hpcnn simulate vgg16 --ranks 1,8,64 --machine cpu-100g --algorithms ring,auto", "strong scaling"),
        ("hpcnn simulate resnet50 --ranks 1,8,512 --machine gpu-nvlink-ndr --samples-per-rank 32", "weak scaling"),
        ("hpcnn simulate my.toml --ranks 1,64 --machine machine.toml --breakdown 64 --out study", "layers, pictures"),
    ),
    files=(("simulation.csv, .svg, .png", "with --out: every point, and speed-up and waiting over cores"),),
    see_also=("hpcnn plan", "hpcnn scale", "hpcnn profile"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("simulate", help="predict training steps on machines that are not at hand")
    explain(parser, MANUAL)
    what, where = parser.add_argument_group("what to simulate"), parser.add_argument_group("the machine")
    what.add_argument("config", help="TOML file or preset")
    what.add_argument("--ranks", required=True, metavar="N,...", help="numbers of ranks: 1,2,4,8192 (required)")
    what.add_argument("--plans", default="data", metavar="A,...", help=f"of {', '.join(PLANS)} (default: data)")
    kinds = "of auto, allreduce, sharded, factors (default: the configuration's)"
    what.add_argument("--exchanges", metavar="A,...", help=kinds)
    algorithms = f"of {', '.join(ALGORITHMS)} (default: auto)"
    what.add_argument("--algorithms", default="auto", metavar="A,...", help=algorithms)
    weak = "weak scaling: the batch is so many for each rank (default: train.global_batch, always)"
    what.add_argument("--samples-per-rank", type=int, default=0, metavar="N", help=weak)
    what.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)")
    machines = f"file, measured by `hpcnn profile` or written by hand, or one of {', '.join(named())} (required)"
    where.add_argument("--machine", required=True, metavar="FILE", help=machines)
    per_node = "ranks a node (default: as the machine's description says, or 1)"
    where.add_argument("--ranks-per-node", type=int, default=0, metavar="K", help=per_node)
    results = parser.add_argument_group("results")
    breakdown = "also show layers and collectives on so many ranks (default: none)"
    results.add_argument("--breakdown", type=int, metavar="N", help=breakdown)
    results.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write table and pictures here (default: only print)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables; no MPI is started."""
    config = configuration.load(args.config, args.set)
    series = [
        Series(plan, kind, algorithm)
        for plan, kind, algorithm in product(
            _words(args.plans), _words(args.exchanges or config.exchange.kind), _words(args.algorithms)
        )
    ]
    ranks = _numbers(args.ranks)
    if args.breakdown is not None and args.breakdown not in ranks:
        raise PlanError(f"simulate: --breakdown (={args.breakdown}) must be one of --ranks (={args.ranks}).")
    machine = load_machine(args.machine)
    if args.out is not None:
        _make_folder(args.out)
    model = model_of(config)
    done = simulate(
        config,
        model,
        machine,
        ranks,
        series,
        ranks_per_node=args.ranks_per_node,
        samples_per_rank=args.samples_per_rank,
    )
    print(_describe(model.name, done))
    for point in (point for point in done.points if point.ranks == args.breakdown):
        print(f"\n{_describe_point(point)}")
    if args.out is not None:
        _write(model.name, done, args.out, str(args.machine))
    return 0


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(word) for word in _words(text)})
    except ValueError:
        raise PlanError(f"simulate: --ranks (={text!r}) must be numbers with commas between them: 1,2,4.") from None


def _make_folder(folder: Path) -> None:
    from hpcnn.report.allreduce import require_matplotlib

    require_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"simulate: cannot make '{folder}': {error}.") from None


def _write(model: str, done: Simulation, folder: Path, machine: str) -> None:
    from hpcnn.report.simulation import plot_simulation, write_csv

    write_csv({model: done}, folder / "simulation.csv")
    pictures = [folder / "simulation.svg", folder / "simulation.png"]
    plot_simulation({model: done}, pictures, f"simulated on {Path(machine).stem}")
    print(f"wrote {', '.join(str(path) for path in (folder / 'simulation.csv', *pictures))}")


def _describe(model: str, done: Simulation) -> str:
    columns = ["plan", "exchange", "algorithm", "ranks", "cores", "batch", "step s", "compute s", "waits s"]
    columns += ["arrays", "speed-up", "efficiency"]
    rows = [_row(point) for series in dict.fromkeys(p.series for p in done.points) for point in done.of(series)]
    head = f"{model}: one core (or device) would take {done.base_s:.4g} s for {done.base_batch} samples"
    notes = "".join(f"\nleft out: {note}" for note in done.missing)
    return f"{head}\n\n{format_table(columns, rows, left=3)}{notes}"


def _row(point: Point) -> tuple[str, ...]:
    series, predicted = point.series, point.prediction
    kind = f"auto: {point.kind}" if series.kind == "auto" and point.kind != "auto" else series.kind
    times = (f"{seconds:.4g}" for seconds in (predicted.step_s, predicted.compute_s, predicted.exposed_s))
    counts = (str(point.ranks), str(point.cores), str(point.global_batch))
    memory = quantity(predicted.memory_bytes, "B")
    return (series.plan, kind, series.algorithm, *counts, *times, memory, f"{point.speed_up:.1f}", _percent(point))


def _percent(point: Point) -> str:
    return f"{100 * point.efficiency:.1f} %"


def _describe_point(point: Point) -> str:
    layers = [
        (
            time.name,
            f"{1e3 * time.compute_s:.3g}",
            f"{1e3 * time.exposed_s:.3g}",
            str(time.num_messages),
            quantity(time.num_bytes, "B") if time.num_bytes else "-",
        )
        for time in point.prediction.layers
    ]
    travels = [
        (
            travel.layers,
            travel.kind,
            ", ".join(travel.algorithms) or "-",
            quantity(travel.num_bytes, "B"),
            f"{1e3 * travel.reduce.seconds:.3g}",
            f"{1e3 * travel.publish.seconds:.3g}" if travel.publish.seconds else "-",
            str(travel.reduce.num_messages + travel.publish.num_messages),
            quantity(travel.reduce.num_bytes + travel.publish.num_bytes, "B"),
        )
        for travel in point.travels
    ]
    layer_columns = ("layer", "compute ms", "waits ms", "messages", "sent")
    columns = ("layers", "exchange", "algorithm", "gradient", "sums ms", "parameters ms", "messages", "sent")
    return (
        f"{point.series.label} on {point.ranks} ranks (messages and bytes: the busiest rank, a step)\n\n"
        f"{format_table(layer_columns, layers)}\n\ncollectives, alone on the wire\n"
        f"{format_table(columns, travels, left=3)}"
    )
