"""`hpcnn bench allreduce|ops|step|overlap`: how fast the parts are here, beside what they could be replaced by."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcnn.cli.manual import Manual, explain
from hpcnn.cli.table import format_table

if TYPE_CHECKING:
    from hpcnn.analysis.bench_allreduce import AllreduceTime, Summary
    from hpcnn.analysis.bench_step import StepTiming

STEP_MODELS = ("lenet5", "resnet20", "alexnet")
STEP_HEADER = (
    "model", "ranks", "batch", "step ms", "fastest", "images/s", "compute", "exchange", "update",
    "PyTorch ms", "speed-up", "loss differs",
)  # fmt: skip

OVERLAP_HEADER = (
    "model", "exchange", "ranks", "batch", "compute alone", "messages alone", "step", "step / longer", "hidden",
    "MB sent",
)  # fmt: skip

MANUAL = Manual(
    """Times parts of the framework on the ranks it is started with, beside what they could be replaced by: all-reduce
    algorithms, operators, whole training steps, and communication behind computation.""",
    examples=(
        ("mpiexec -n 4 hpcnn bench allreduce", "messages"),
        ("hpcnn bench ops --models vgg16", "operators"),
    ),
    see_also=("hpcnn bench allreduce --help", "hpcnn profile", "docs/benchmarks.md"),
)
JSON_FILE = (("FILE", "with --json: the host's name, all numbers and times"),)
ALLREDUCE = Manual(
    """Times every all-reduce algorithm of float32 arrays by message size, beside the MPI library's own and what the
    prices of the machine predict. All algorithms take turns at each size, and the slowest rank counts.""",
    examples=(
        ("mpiexec -n 4 hpcnn bench allreduce --max-bytes 1048576", "up to 1 MiB"),
        ("srun hpcnn bench allreduce --machine machine.toml --json times.json", "predictions of a measured machine"),
        ("mpiexec -n 4 hpcnn bench allreduce --algorithms ring mpi --plot times.png", "two algorithms, drawn"),
    ),
    files=(*JSON_FILE, ("FILE", "with --plot: the times as a picture")),
    see_also=("hpcnn profile",),
)
OPS = Manual(
    """Times convolutions, poolings and fully connected layers of known models, forward and both gradients, beside
    PyTorch where it is installed. One rank.""",
    examples=(("hpcnn bench ops --models vgg16 resnet50 --batch 16", "two models"),),
    files=JSON_FILE,
    see_also=("hpcnn bench step",),
)
STEP = Manual(
    """Times training steps of whole models on synthetic images, with what they spend in computing, the exchange and
    updates, beside PyTorch where it is installed.""",
    examples=(
        ("hpcnn bench step --models resnet20", "one rank"),
        ("mpiexec -n 2 hpcnn bench step --models alexnet --batch 64 --no-peer", "two ranks, hpcnn alone"),
    ),
    files=JSON_FILE,
    see_also=("hpcnn bench overlap", "hpcnn bench ops"),
)
OVERLAP = Manual(
    """Times steps of a configuration, their computation alone and their messages alone: how much of the communication
    hides behind computing.""",
    examples=(("mpiexec -n 4 hpcnn bench overlap vgg11-32 --kinds allreduce sharded", "two ways to exchange"),),
    files=JSON_FILE,
    see_also=("hpcnn train --trace",),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("bench", help="time all-reduce algorithms, operators or training steps")
    explain(parser, MANUAL)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="allreduce|ops|step|overlap")

    allreduce = _add_allreduce(kinds)
    ops = kinds.add_parser("ops", help="operators on the layers of known models, beside PyTorch where it is installed")
    explain(ops, OPS)
    ops.add_argument("--models", nargs="+", metavar="NAME", help="default: vgg16 resnet50 alexnet")
    ops.set_defaults(run=_ops)

    step = kinds.add_parser("step", help="training steps of whole models, beside PyTorch where it is installed")
    explain(step, STEP)
    models = f"presets (default: {' '.join(STEP_MODELS)})"
    step.add_argument("--models", nargs="+", default=list(STEP_MODELS), metavar="NAME", help=models)
    step.add_argument(
        "--shards",
        type=_positive,
        default=0,
        metavar="V",
        help="also time reproducible steps, in V virtual shards (default: none)",
    )
    step.set_defaults(run=_step)

    overlap = kinds.add_parser("overlap", help="how much communication hides behind a configuration's training steps")
    explain(overlap, OVERLAP)
    overlap.add_argument("config", nargs="?", default="resnet20", help="TOML file or preset (default: resnet20)")
    overlap.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)"
    )
    overlap.add_argument("--kinds", nargs="+", metavar="KIND", help="values of exchange.kind (default: the setting)")
    overlap.add_argument("--steps", type=_positive, default=4, metavar="N", help="timed steps in a row (default: 4)")
    overlap.set_defaults(run=_overlap)

    for kind in (ops, step):
        kind.add_argument(
            "--batch", type=_positive, default=16, metavar="N", help="samples, over all ranks (default: 16)"
        )
        kind.add_argument("--no-peer", action="store_true", help="time hpcnn alone")
    for kind, repeats in ((allreduce, None), (ops, 5), (step, 5), (overlap, 3)):
        default = repeats or "about a second's worth"
        kind.add_argument(
            "--repeats", type=_positive, default=repeats, metavar="N", help=f"timed rounds (default: {default})"
        )
        kind.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file (default: no)")


def _add_allreduce(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    allreduce = kinds.add_parser(
        "allreduce", help="all-reduce algorithms by message size, beside the MPI library's own"
    )
    explain(allreduce, ALLREDUCE)
    allreduce.add_argument("--sizes", nargs="+", type=_positive, metavar="BYTES", help="default: 4 bytes to 256 MiB")
    allreduce.add_argument(
        "--min-bytes", type=_positive, default=4, metavar="BYTES", help="leave out shorter ones (default: 4)"
    )
    allreduce.add_argument(
        "--max-bytes",
        type=_positive,
        default=256 << 20,
        metavar="BYTES",
        help="leave out longer ones (default: 256 MiB)",
    )
    allreduce.add_argument("--algorithms", nargs="+", metavar="NAME", help="default: all of ours, mpi and auto")
    allreduce.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="about how long a size may take (default: 2)"
    )
    allreduce.add_argument(
        "--machine",
        type=Path,
        metavar="FILE",
        help="what auto and predictions go by, of `hpcnn profile` (default: built-in)",
    )
    allreduce.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the times; needs hpcnn[plots] (default: no)"
    )
    allreduce.set_defaults(run=_allreduce)
    return allreduce


def run(args: argparse.Namespace) -> int:
    """Time what was asked for and print a table (collective)."""
    return int(args.run(args))


def _allreduce(args: argparse.Namespace) -> int:
    from hpcnn.analysis import bench_allreduce as bench
    from hpcnn.comm import start
    from hpcnn.plan.machine import from_toml
    from hpcnn.report.allreduce import plot_allreduce, require_matplotlib

    world = start()
    text = ""
    with world.agreeing():
        if world.rank == 0:
            text = "" if args.machine is None else _text_of(args.machine)
            if args.plot is not None:
                require_matplotlib()
    text = world.broadcast_obj(text)
    rows = bench.bench_allreduce(
        world,
        [size for size in args.sizes or bench.SIZES if args.min_bytes <= size <= args.max_bytes],
        args.algorithms,
        args.repeats,
        machine=from_toml(text, str(args.machine)) if text else None,
        seconds=args.seconds,
    )
    summary = bench.summarise(rows)
    with world.agreeing():
        if world.rank == 0:
            lines = [_allreduce_table(rows), *([] if summary is None else [_summary_line(summary)])]
            _report("\n".join(lines), rows, args.json, summary=summary and dataclasses.asdict(summary))
            if args.plot is not None and rows:
                plot_allreduce(rows, args.plot)
    return 0


def _allreduce_table(rows: Sequence[AllreduceTime]) -> str:
    """Return a line a size: what each algorithm took and was predicted to take, and what auto took."""
    from hpcnn.analysis.bench_allreduce import size_text

    if not rows:
        return "no measurements"
    names = list(dict.fromkeys(row.algorithm for row in rows))
    cells = {(row.num_bytes, row.algorithm): row for row in rows}
    lines = []
    for size in dict.fromkeys(row.num_bytes for row in rows):
        here = [cells[size, name] for name in names]
        line = [size_text(size), str(here[0].repeats)]
        for row in here:
            line.append(milliseconds(row.median_s) + (f" {row.runs}" if row.algorithm == "auto" else ""))
            if row.algorithm not in ("mpi", "auto"):
                line.append("-" if row.predicted_s is None else milliseconds(row.predicted_s))
        lines.append(line)
    header = ["size", "turns"]
    for name in names:
        header += [name] if name in ("mpi", "auto") else [name, "predicted"]
    head = f"all-reduce of float32 over {rows[0].num_ranks} ranks: milliseconds, median of the turns"
    return f"{head}\n{format_table(header, lines)}"


def _summary_line(summary: Summary) -> str:
    from hpcnn.analysis.bench_allreduce import size_text

    by_mpi = ""
    if summary.auto_by_mpi is not None and summary.auto_by_mpi_bytes is not None:
        by_mpi = f", {summary.auto_by_mpi:.2f} times the library's own ({size_text(summary.auto_by_mpi_bytes)})"
    return (
        f"auto takes at worst {summary.auto_by_best:.2f} times the best of ours"
        f" ({size_text(summary.auto_by_best_bytes)}){by_mpi}; predictions are off by {summary.median_error:.0%} in the"
        f" median, {summary.max_error:.0%} at most ({summary.max_error_at})"
    )


def milliseconds(seconds: float) -> str:
    """Return milliseconds with three digits, or more where they stand before the point."""
    value = seconds * 1e3
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}" if value >= 1.0 else f"{value:.4f}"


def _text_of(path: Path) -> str:
    """Return the text of a machine file that has been found right."""
    from hpcnn.plan.machine import load, to_toml

    return to_toml(load(path))


def _ops(args: argparse.Namespace) -> int:
    from hpcnn.analysis import bench_ops as bench

    rows = bench.bench_ops(args.models or bench.MODELS, batch=args.batch, repeats=args.repeats, peer=not args.no_peer)
    _report(bench.format_table(rows), rows, args.json)
    return 0


def _step(args: argparse.Namespace) -> int:
    from hpcnn.analysis.bench_step import time_step
    from hpcnn.comm import start

    world = start()
    timings = [
        time_step(
            name,
            global_batch=args.batch,
            repeats=args.repeats,
            world=world,
            peer=not args.no_peer,
            num_shards=args.shards,
        )
        for name in args.models
    ]
    if world.rank == 0:
        head = f"medians of {args.repeats} steps, {world.num_threads} threads a rank"
        lines = [f"{head}\n{format_table(STEP_HEADER, [_step_row(timing) for timing in timings])}"]
        lines += [
            f"reproducible, in {args.shards} virtual shards: {timing.model} {1e3 * timing.reproducible_s:.1f} ms,"
            f" {timing.reproducible_cost:.2f} times as long"
            for timing in timings
            if timing.reproducible_s is not None
        ]
        _report("\n".join(lines), timings, args.json)
    return 0


def _step_row(timing: StepTiming) -> tuple[str, ...]:
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.1f}"

    return (
        timing.model,
        str(timing.ranks),
        str(timing.global_batch),
        ms(timing.step_s),
        ms(timing.fastest_s),
        f"{timing.images_per_second:.1f}",
        ms(timing.compute_s),
        ms(timing.exchange_s),
        ms(timing.update_s),
        ms(timing.peer_s),
        "-" if timing.speedup is None else f"{timing.speedup:.2f}",
        "-" if timing.loss_difference is None else f"{timing.loss_difference:.0e}",
    )


def _overlap(args: argparse.Namespace) -> int:
    from hpcnn import configuration
    from hpcnn.analysis.bench_overlap import time_overlap
    from hpcnn.comm import start

    world = start()
    with world.agreeing():
        kinds = args.kinds or [configuration.load(args.config, args.set).exchange.kind]
        configs = [configuration.load(args.config, [*args.set, f"exchange.kind={kind}"]) for kind in kinds]
    timings = [time_overlap(config, world, steps=args.steps, repeats=args.repeats) for config in configs]
    if world.rank == 0:
        lines = [
            (
                timing.model, timing.kind, str(timing.ranks), str(timing.global_batch),
                *(milliseconds(seconds) for seconds in (timing.compute_s, timing.comm_s, timing.step_s)),
                f"{timing.over_longer:.2f}", f"{timing.hidden_share:.0%}", f"{timing.num_bytes / 1e6:.1f}",
            )
            for timing in timings
        ]  # fmt: skip
        head = f"a step in milliseconds: medians of {args.repeats} times {args.steps} steps, the slowest rank"
        _report(f"{head}\n{format_table(OVERLAP_HEADER, lines, left=2)}", timings, args.json)
    return 0


def _report(text: str, rows: Sequence[Any], path: Path | None, **more: Any) -> None:
    print(text)
    if path is not None:
        results = [dataclasses.asdict(row) | getattr(row, "ratios", {}) for row in rows]
        path.write_text(json.dumps({"host": platform.node(), "results": results, **more}, indent=2) + "\n")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value
