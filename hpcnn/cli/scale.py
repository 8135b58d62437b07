"""`hpcnn scale`: how training scales over numbers of ranks, plans, exchanges and algorithms.

The command starts no MPI itself: every point is a job of its own, started by the launcher.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcnn import configuration
from hpcnn.cli.manual import EXIT_CODES, Manual, explain
from hpcnn.cli.table import format_table, quantity
from hpcnn.errors import ConfigError

if TYPE_CHECKING:
    from hpcnn.analysis.confidence import Estimate
    from hpcnn.analysis.jobs import Launcher
    from hpcnn.analysis.scaling_table import Row, Summary

HEADER = [
    "plan", "exchange", "algorithm", "ranks", "batch", "runs", "step ms", "speed-up", "efficiency", "compute ms",
    "exposed ms", "images/s", "memory", "sent",
]  # fmt: skip
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")

MANUAL = Manual(
    """Trains every combination of ranks, plans, exchanges and algorithms for a few steps, several times, each in a job
    of its own that the launcher starts, and prints step times, speed-up and efficiency with 95 % intervals. Do not
    start it under mpirun. The same command goes on after Ctrl-C or a time limit; what is finished is not run again.""",
    examples=(
        ("hpcnn scale resnet20 --ranks 1,2,4 --plans data,auto --out studies/a", "on this node, by mpirun"),
        ("hpcnn scale my.toml --ranks 1,8,64 --mode weak --launcher srun --launcher-args=--mpi=pmi2", "in a Slurm job"),
        ("hpcnn scale studies/a", "the table as far as it is there"),
    ),
    files=(
        ("scaling.csv", "in the study's folder: a row for each run"),
        ("*.svg, *.png", "with hpcnn[plots]: the table as pictures"),
        ("points/NAME", "each run's folder and log"),
    ),
    exit_codes=((0, "all points are finished, or were submitted"), (1, "a point has failed"), *EXIT_CODES[2:]),
    see_also=("hpcnn plan", "hpcnn bench overlap", "hpcnn profile"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("scale", help="measure how training scales over ranks, plans and algorithms")
    explain(parser, MANUAL)
    points = parser.add_argument_group("points")
    points.add_argument("config", help="TOML file or preset; or the folder of a study, to print what is there by now")
    of_config = "(default: the configuration's)"
    points.add_argument("--ranks", type=_counts, default=[], metavar="N,...", help="numbers of ranks (default: none)")
    points.add_argument(
        "--plans", type=_words, default=[], metavar="P,...", help=f"values of plan.preset; plan files {of_config}"
    )
    points.add_argument(
        "--exchanges", type=_words, default=[], metavar="K,...", help=f"values of exchange.kind {of_config}"
    )
    points.add_argument(
        "--algorithms", type=_words, default=[], metavar="A,...", help=f"values of exchange.algorithm {of_config}"
    )
    points.add_argument(
        "--mode",
        choices=("strong", "weak"),
        default="strong",
        help="weak: train.global_batch samples on every rank (default: strong)",
    )
    points.add_argument("--repeats", type=_count, default=3, metavar="N", help="runs of each point (default: 3)")
    points.add_argument(
        "--steps", type=_count, default=12, metavar="N", help="of each run; the first two do not count (default: 12)"
    )
    points.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)"
    )
    points.add_argument(
        "--machine", default="", metavar="FILE", help="of `hpcnn profile`, to predict steps by (default: none)"
    )
    _add_job_options(parser.add_argument_group("jobs"))


def _add_job_options(jobs: argparse._ArgumentGroup) -> None:
    jobs.add_argument(
        "--ranks-per-node",
        type=_count,
        metavar="K",
        help="for predictions, srun, and {hosts} below (default: the launcher's)",
    )
    jobs.add_argument(
        "--launcher",
        default="mpirun",
        metavar="NAME",
        help="mpirun, srun, sbatch, or a command with {ranks} or {hosts} (default: mpirun)",
    )
    jobs.add_argument(
        "--launcher-args",
        default="",
        metavar="WORDS",
        help="for mpirun or srun: --launcher-args='-c 4' (default: none)",
    )
    jobs.add_argument(
        "--sbatch-args", default="", metavar="WORDS", help="for sbatch: --sbatch-args='--time=30' (default: none)"
    )
    jobs.add_argument("--limit", type=float, default=3600.0, metavar="S", help="longest run in seconds (default: 3600)")
    jobs.add_argument(
        "--point",
        metavar="NAME",
        help="run this point of a study's folder only, as batch jobs do (default: all)",
    )
    jobs.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="the study's folder; goes on with it (default: runs/scale-CONFIG)",
    )


def run(args: argparse.Namespace) -> int:
    """Run what is not finished and print the table; return 1 when a point has failed."""
    from hpcnn.analysis import jobs, scaling_table

    sizes = [os.environ.get(name, "") for name in _SIZES]
    if any(size.isdecimal() and int(size) > 1 for size in sizes):
        raise ConfigError("scale: must not be started on several ranks; it starts the jobs itself. Leave out mpirun.")
    if args.steps <= scaling_table.WARM_UP_STEPS:
        raise ConfigError(
            f"scale: --steps (={args.steps}) must be more than the {scaling_table.WARM_UP_STEPS} that are not counted."
        )
    launcher = jobs.Launcher.of(args.launcher, args.launcher_args, args.ranks_per_node)
    if not args.limit > 0:
        raise ConfigError(f"scale: --limit (={args.limit:g}) must be more than 0 seconds.")
    if args.sbatch_args and args.launcher != "sbatch":
        raise ConfigError("scale: --sbatch-args are for --launcher sbatch; give that too.")
    # A batch system's end of time is the same to us as Ctrl-C: the job is ended, and the study can be gone on with.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not args.ranks and Path(args.config).is_dir():
        return _go_on(args, launcher)
    return _study(args, launcher)


def _go_on(args: argparse.Namespace, launcher: Launcher) -> int:
    """Print what a study's folder holds, or run one point of it."""
    from hpcnn.analysis.scaling_point import POINTS

    folder = Path(args.config)
    if args.point is None:
        _show(folder)
        return 0
    return int(_run_all(folder.resolve() / POINTS, [args.point], launcher, args.limit) > 0)


def _study(args: argparse.Namespace, launcher: Launcher) -> int:
    """Prepare a study, run or submit its points, and print the table."""
    from hpcnn.analysis import jobs, scaling
    from hpcnn.analysis.scaling_point import POINTS, status

    if not args.ranks or args.point:
        raise ConfigError(
            f"scale: '{args.config}' must be the folder of a study, which --point goes with, or a configuration, which"
            " --ranks goes with. Add --ranks 1,2,4 for instance."
        )
    if Path(args.config).is_dir() and args.config not in configuration.presets():
        raise ConfigError(
            f"scale: '{args.config}' is a folder; --ranks go with a configuration. To add points to a study, name its"
            f" configuration, and --out {args.config}."
        )
    folder = (args.out or Path("runs") / f"scale-{Path(args.config).stem}").resolve()
    study = scaling.Study(
        source=args.config, overrides=args.set, ranks=args.ranks, plans=args.plans, exchanges=args.exchanges,
        algorithms=args.algorithms, mode=args.mode, repeats=args.repeats, steps=args.steps, machine=args.machine,
        ranks_per_node=args.ranks_per_node,
    )  # fmt: skip
    points = scaling.prepare(study, folder)
    home = folder / POINTS
    if args.launcher != "sbatch":
        if args.launcher == "mpirun" and "OMP_NUM_THREADS" not in os.environ:
            print("hpcnn: note: OMP_NUM_THREADS is not set: one rank of a node has the cores that several share.")
        try:
            num_failed = _run_all(home, [point.name for point in points], launcher, args.limit)
        except KeyboardInterrupt:
            print(f"\ninterrupted; the same command goes on, `hpcnn scale {folder}` shows what is there", flush=True)
            raise
        _show(folder)
        return int(num_failed > 0)
    left = [point for point in points if status(home / point.name)[0] in ("failed", "pending")]
    if not left:
        _show(folder)
        return 0
    command = [sys.executable, "-m", "hpcnn", "scale", str(folder), "--launcher", "srun"]
    command += [f"--launcher-args={args.launcher_args}", f"--limit={args.limit:g}"]
    command += [f"--ranks-per-node={args.ranks_per_node}"] if args.ranks_per_node else []
    most, names = max(point.ranks for point in left), [point.name for point in left]
    text = jobs.batch_script(folder, names, most, [*command, "--point"], args.sbatch_args, args.ranks_per_node)
    number = jobs.submit(folder / jobs.BATCH_SCRIPT, text)
    print(f"submitted {len(names)} runs as job {number}; `hpcnn scale {folder}` shows what has come of them")
    return 0


def _run_all(home: Path, names: Sequence[str], launcher: Launcher, limit_s: float) -> int:
    """Run points one after the other and return how many are not finished."""
    from hpcnn.analysis import scaling_point, scaling_table

    failed = 0
    for number, name in enumerate(names, 1):
        if scaling_table.read_row(home / name).status == "finished":
            continue
        print(f"[{number}/{len(names)}] {name}: ", end="", flush=True)
        status, reason = scaling_point.run(home / name, launcher, limit_s)
        step_s = scaling_table.read_row(home / name).step_s
        print(f"{1e3 * step_s:.4g} ms a step" if step_s else f"{status} {reason}".strip(), flush=True)
        failed += status != "finished"
    return failed


def _show(folder: Path) -> None:
    """Write the study's table and pictures, and print what they say."""
    from hpcnn.analysis import scaling_table
    from hpcnn.report.scaling import plot_scaling

    rows = scaling_table.collect(folder)
    written = [folder / scaling_table.FILE]
    scaling_table.write_csv(rows, written[0])
    drawable = importlib.util.find_spec("matplotlib") is not None
    for mode in dict.fromkeys(row.mode for row in rows):
        summaries = scaling_table.summarise(rows, mode)
        if summaries:
            print(f"\n{describe(rows[0].model, mode, summaries)}")
            if drawable:
                written += plot_scaling(summaries, folder / f"scaling-{mode}", f"{rows[0].model}, {mode} scaling")
    for line in unfinished(rows):
        print(line)
    print(f"written: {', '.join(map(str, written))}")
    if not drawable:
        print("no pictures: matplotlib is not installed (pip install 'hpcnn[plots]')")


def describe(model: str, mode: str, summaries: Sequence[Summary]) -> str:
    """Return the table of one mode, and how to read it."""
    from hpcnn.analysis.scaling_table import WARM_UP_STEPS

    predicted = any(summary.predicted_step_s is not None for summary in summaries)
    on_device = any(summary.device_memory_bytes is not None for summary in summaries)
    header = HEADER + ["device memory"] * on_device + ["predicted ms"] * predicted
    rows = []
    for one in summaries:
        row = [one.plan, one.exchange, one.algorithm, str(one.ranks), str(one.global_batch), str(one.repeats)]
        row += [_interval(one.step_s, 1e3), _interval(one.speedup), f"{one.efficiency.value:.0%}"]
        row += [f"{1e3 * one.compute_s:.3g}", f"{1e3 * one.exposed_comm_s:.3g}", quantity(one.images_per_second)]
        row += [quantity(one.memory_bytes, "B"), quantity(one.bytes_sent, "B") if one.bytes_sent else "-"]
        row += [quantity(one.device_memory_bytes, "B") if one.device_memory_bytes else "-"] * on_device
        row += [_prediction(one)] * predicted
        rows.append(row)
    base = min(summaries, key=lambda one: (one.ranks, one.step_s.value))
    note = (
        f"A step is the median of a run's, without the first {WARM_UP_STEPS}, in the mean over the runs; +- is half of"
        " its 95 % interval (Student's t).\n"
        f"Speed-up is over {base.contender} on {base.ranks} rank{'s' * (base.ranks > 1)}"
        f"{'' if mode == 'strong' else ', by images a second'}; efficiency is speed-up by ranks. Times and bytes are"
        " rank 0's, memory is the largest of any rank's."
    )
    return f"{model}, {mode} scaling\n{format_table(header, rows, left=3)}\n{note}"


def unfinished(rows: Sequence[Row]) -> list[str]:
    """Return a line for each point that has failed, or is still to come."""
    lines = [f"{row.name}: {row.status}{': ' * bool(row.reason)}{row.reason}" for row in rows if row.status == "failed"]
    waiting = [row.status for row in rows if row.status in ("pending", "running")]
    if waiting:
        lines.append(f"not there yet: {waiting.count('pending')} pending, {waiting.count('running')} running")
    return lines


def _interval(one: Estimate, scale: float = 1.0) -> str:
    """Return "12.3 +- 0.4", the value with one digit more than the interval's first."""
    return f"{scale * one.value:.4g}" + ("" if one.half_width is None else f" +- {scale * one.half_width:.2g}")


def _prediction(one: Summary) -> str:
    if one.predicted_step_s is None:
        return "-"
    return f"{1e3 * one.predicted_step_s:.4g} ({one.predicted_step_s / one.step_s.value - 1:+.0%})"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(word) for word in _words(text)]


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} must be words with commas between them")
    return words
