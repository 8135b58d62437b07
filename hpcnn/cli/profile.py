"""`hpcnn profile`: measures messages, additions, layers and updates here, for choices and plans by price."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpcnn.cli.manual import Manual, explain
from hpcnn.cli.table import format_table, quantity
from hpcnn.errors import PlanError
from hpcnn.plan.planner import PRESETS

if TYPE_CHECKING:
    from hpcnn.config import Config
    from hpcnn.plan.machine import Link, Machine, Timing
    from hpcnn.spec import ModelSpec

MANUAL = Manual(
    """Measures, on the ranks that it is started with, what messages cost within a node and between nodes, how fast a
    rank adds and computes, and with --model what the layers of a model take as plans cut them. Settings such as
    exchange.machine and commands such as `hpcnn plan` choose by the file that it writes. Use as many ranks and
    nodes as training will; takes about --seconds, and --layer-seconds for each model and batch.""",
    examples=(
        ("mpiexec -n 8 hpcnn profile", "messages and arithmetic, into machine.toml"),
        ("srun hpcnn profile --model my.toml --out machine.toml", "the layers of a model, too"),
        ("mpiexec -n 4 hpcnn profile --max-bytes 1048576 --seconds 10", "a quick look"),
    ),
    files=(("machine.toml", "(--out) what was measured; replaced if it exists"),),
    see_also=("hpcnn plan", "hpcnn bench allreduce", "hpcnn doctor"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("profile", help="measure this machine's messages and arithmetic (with mpirun)")
    explain(parser, MANUAL)
    parser.add_argument(
        "--out", type=Path, default=Path("machine.toml"), metavar="FILE", help="file to write (default: machine.toml)"
    )
    messages = parser.add_argument_group("messages")
    messages.add_argument(
        "--max-bytes", type=int, default=64 << 20, metavar="BYTES", help="longest message (default: 64 MiB)"
    )
    messages.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="time for the messages; on slow links long ones are left out (default: 60)",
    )
    layers = parser.add_argument_group("layers of models")
    layers.add_argument(
        "--model", action="append", default=[], metavar="CONFIG", help="also time the layers of this model (repeatable)"
    )
    layers.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of models (repeatable)"
    )
    layers.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help="global batches in samples (default: the models' own)"
    )
    layers.add_argument(
        "--preset", nargs="+", default=list(PRESETS), choices=list(PRESETS), help="as these split them (default: all)"
    )
    layers.add_argument(
        "--layer-seconds", type=float, default=120.0, metavar="S", help="time for the layers of a model (default: 120)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure on all ranks; rank 0 writes the file and prints what was found (collective)."""
    from hpcnn import configuration
    from hpcnn.analysis.profile_layers import profile_layers
    from hpcnn.analysis.profile_machine import profile
    from hpcnn.analysis.stopwatch import Stopwatch
    from hpcnn.comm import start
    from hpcnn.plan.machine import to_toml

    if args.max_bytes < 4 or not args.seconds > 0.0:
        raise PlanError(
            f"profile: --max-bytes (={args.max_bytes}) must be at least 4 and --seconds (={args.seconds}) positive."
        )
    world = start()
    with world.agreeing():
        configs = [configuration.load(source, args.set) for source in args.model]
        specs = [build_spec(config) for config in configs]
        if world.rank == 0:
            _write(args.out, None)  # a wrong path is worth knowing before the measurement
    watch = Stopwatch(world)
    machine = profile(world, max_bytes=args.max_bytes, seconds=args.seconds, watch=watch)
    timings: tuple[Timing, ...] = ()
    for spec, config in zip(specs, configs, strict=True):
        for batch in args.batch or [config.train.global_batch]:
            timings += profile_layers(watch, spec, batch, presets=args.preset, seconds=args.layer_seconds)
    machine = replace(machine, timings=timings)
    with world.agreeing():
        if world.rank == 0:
            _write(args.out, to_toml(machine))
            print(f"{describe(machine)}\nwrote {args.out}")
    return 0


def build_spec(config: Config) -> ModelSpec:
    """Return the model that a configuration describes, for the images that it names."""
    from hpcnn.data import open_data
    from hpcnn.nn import models

    with open_data(config.data, "train") as data:
        return models.configured(config.model, data.image_shape, data.num_classes)


def describe(machine: Machine) -> str:
    """Return the machine as a few lines and a table."""
    measured = machine.measured
    lines = []
    if measured is not None:
        lines.append(
            f"{measured.ranks} ranks on {measured.hosts} hosts, {measured.cores} cores for each, {measured.mpi}"
        )
    for name, link in (("node", machine.node), ("network", machine.network)):
        if link is None:
            why = "one rank a host" if name == "node" else "a single host"
            lines.append(f"{name}: not measured ({why}); the built-in numbers stand in")
        else:
            speed = quantity(1.0 / link.beta_s_per_byte, "B/s") if link.beta_s_per_byte else "no measurable limit"
            crossing = f", {link.crossing:.2f} times as long where they cross" if link.crossing > 1.0 else ""
            lines.append(f"{name}: about {link.alpha_s * 1e6:.1f} us a message and {speed} each way{crossing}")
    rates = machine.rates
    lines += [
        f"ranks that meet after computing: {machine.stall_s * 1e3:.3g} ms out of step",
        f"a collective: {machine.start_s * 1e6:.1f} us besides its messages;"
        f" additions: {quantity(1.0 / machine.gamma_s_per_byte, 'B/s')}",
        f"a rank: convolutions {quantity(rates.conv_forward_flops_per_s, 'flop/s')} forward,"
        f" {quantity(rates.conv_input_gradient_flops_per_s, 'flop/s')} input gradient,"
        f" {quantity(rates.conv_weight_gradient_flops_per_s, 'flop/s')} weight gradient;"
        f" linear {quantity(rates.linear_flops_per_s, 'flop/s')}; update {quantity(rates.update_bytes_per_s, 'B/s')};"
        f" memory {quantity(rates.memory_bytes_per_s, 'B/s')}; {rates.call_s * 1e6:.0f} us an operator,"
        f" {rates.layer_s * 1e6:.0f} us more a layer each way;"
        f" {100 * rates.beside_share:.0f} % longer while messages are under way, and"
        f" {rates.beside_s_per_byte * 1e9:.2f} ns for a byte sent meanwhile, at {100 * rates.pace_beside:.0f} %"
        " of the speed at which it travels while ranks wait;"
        f" {len(machine.timings)} layers timed",
        "",
        _table(machine),
    ]
    return "\n".join(lines)


def _table(machine: Machine) -> str:
    links = {name: link for name, link in (("node", machine.node), ("network", machine.network)) if link is not None}
    sizes = sorted({size for link in links.values() for size in link.sizes})
    header = ["message B"]
    for name in links:
        header += [f"{name} store us", f"{name} add us", "line us"]
    rows = []
    for size in sizes:
        row = [str(size)]
        for link in links.values():
            row += _cells(link, size)
        rows.append(row)
    return format_table(header, rows, left=0)


def _cells(link: Link, size: int) -> list[str]:
    if size not in link.sizes:
        return ["-", "-", "-"]
    index = link.sizes.index(size)
    values = (link.copy_s[index], link.sum_s[index], link.alpha_s + size * link.beta_s_per_byte)
    return [f"{value * 1e6:.1f}" for value in values]


def _write(path: Path, text: str | None) -> None:
    """Write the file in one piece, or with no text only find out whether that can be done."""
    from hpcnn.train.atomic import replacing

    try:
        if text is None:
            trial = path.with_name(f".{path.name}.trial")
            trial.touch()
            trial.unlink()
        else:
            with replacing(path) as temporary:
                temporary.write_text(text)
    except OSError as error:
        raise PlanError(f"profile: cannot write '{path}': {error}. Name another file with --out.") from None
