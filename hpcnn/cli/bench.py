"""`hpcnn bench allreduce|ops|step`: how fast the parts are here, beside what they could be replaced by."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcnn.cli.table import format_table

if TYPE_CHECKING:
    from hpcnn.analysis.bench_step import StepTiming

STEP_MODELS = ("lenet5", "resnet20", "alexnet")
STEP_HEADER = (
    "model", "ranks", "batch", "step ms", "fastest", "images/s", "compute", "exchange", "update",
    "PyTorch ms", "speed-up", "loss differs",
)  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("bench", help="time all-reduce algorithms, operators or training steps")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="allreduce|ops|step")

    allreduce = kinds.add_parser(
        "allreduce", help="all-reduce algorithms by message size, beside the MPI library's own"
    )
    allreduce.add_argument("--sizes", nargs="+", type=_positive, metavar="BYTES", help="default: 4 bytes to 64 MiB")
    allreduce.add_argument("--algorithms", nargs="+", metavar="NAME", help="default: all of ours, and mpi")
    allreduce.set_defaults(run=_allreduce)

    ops = kinds.add_parser("ops", help="operators on the layers of known models, beside PyTorch where it is installed")
    ops.add_argument("--models", nargs="+", metavar="NAME", help="default: vgg16 resnet50 alexnet")
    ops.set_defaults(run=_ops)

    step = kinds.add_parser("step", help="training steps of whole models, beside PyTorch where it is installed")
    step.add_argument("--models", nargs="+", default=list(STEP_MODELS), metavar="NAME", help="presets")
    step.set_defaults(run=_step)

    for kind in (ops, step):
        kind.add_argument("--batch", type=_positive, default=16, help="samples, over all ranks (default: 16)")
        kind.add_argument("--no-peer", action="store_true", help="time hpcnn alone")
    for kind, repeats in ((allreduce, None), (ops, 5), (step, 5)):
        default = repeats or "about a second's worth"
        kind.add_argument("--repeats", type=_positive, default=repeats, help=f"timed rounds (default: {default})")
        kind.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")


def run(args: argparse.Namespace) -> int:
    """Time what was asked for and print a table (collective)."""
    return int(args.run(args))


def _allreduce(args: argparse.Namespace) -> int:
    from hpcnn.analysis import bench_allreduce as bench
    from hpcnn.comm import start

    world = start()
    rows = bench.bench_allreduce(
        world, args.sizes or bench.SIZES, args.algorithms or bench.ALGORITHMS, repeats=args.repeats
    )
    if world.rank == 0:
        _report(bench.format_table(rows), rows, args.json)
    return 0


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
        time_step(name, global_batch=args.batch, repeats=args.repeats, world=world, peer=not args.no_peer)
        for name in args.models
    ]
    if world.rank == 0:
        head = f"medians of {args.repeats} steps, {world.num_threads} threads a rank"
        _report(f"{head}\n{format_table(STEP_HEADER, [_step_row(timing) for timing in timings])}", timings, args.json)
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


def _report(text: str, rows: list[Any], path: Path | None) -> None:
    print(text)
    if path is not None:
        results = [dataclasses.asdict(row) for row in rows]
        path.write_text(json.dumps({"host": platform.node(), "results": results}, indent=2) + "\n")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value
