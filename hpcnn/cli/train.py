"""`hpcnn train`: the command that a batch job starts on every rank."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hpcnn import bounded, configuration
from hpcnn.cli.manual import EXIT_CODES, Manual, explain
from hpcnn.config import Config
from hpcnn.errors import ConfigError, HpcnnError
from hpcnn.train import recovery
from hpcnn.train.atomic import replacing
from hpcnn.train.observer import Observer
from hpcnn.train.setup import Parts, assemble, device_errors
from hpcnn.train.signals import StopRequest
from hpcnn.train.trainer import EXIT_RUN_AGAIN, Trainer

if TYPE_CHECKING:
    from hpcnn.comm.world import World
    from hpcnn.train.checkpoint import Checkpoint

DEFAULT = "lenet5"

MANUAL = Manual(
    """Trains the network that a configuration describes, on all ranks of the job. Without a configuration it trains
    LeNet-5 on the built-in images. USR1 or TERM makes it write a checkpoint and exit with 75; the same command with
    --resume goes on, on any number of ranks. OMP_NUM_THREADS sets the threads of a rank; without it each takes its
    share of the cores.""",
    examples=(
        ("hpcnn train", "LeNet-5 on the built-in images, one rank"),
        ("mpiexec -n 4 hpcnn train resnet20 --out runs/a", "a preset on four ranks"),
        ("mpiexec -n 4 hpcnn train my.toml --set train.lr=0.05 --set train.epochs=5", "a file, two settings changed"),
        ("srun hpcnn train my.toml --out runs/b --resume", "start, or go on from the newest checkpoint"),
        (
            "mpiexec -n 4 hpcnn train yolo16 --plan plan.toml",
            "layers split as `hpcnn plan --save` wrote, or you edited",
        ),
    ),
    files=(
        ("config.toml", "in the run folder: the configuration, complete"),
        ("plan.toml", "which part of every layer each rank has"),
        ("metrics.jsonl", "one JSON object a line: losses, accuracies, seconds, bytes"),
        ("environment.json", "hosts with their ranks and cores, versions, the command"),
        ("trace.json", "with --trace: what every rank did when, for ui.perfetto.dev"),
        ("checkpoints/step-*.h5", "parameters and optimizer state, for any number of ranks"),
        ("analysis.h5", "with analysis.information_plane_every_steps: the information plane, for `hpcnn analyze`"),
        ("final.h5", "the trained network"),
    ),
    exit_codes=(*EXIT_CODES, (EXIT_RUN_AGAIN, "stopped by a signal behind a checkpoint: run again with --resume")),
    see_also=("hpcnn plan", "hpcnn evaluate", "hpcnn report", "hpcnn doctor", "hpcnn/config.py for every setting"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("train", help="train a network (start it with mpirun or srun)")
    explain(parser, MANUAL)
    what, where = parser.add_argument_group("what to train"), parser.add_argument_group("the run")
    what.add_argument(
        "config", nargs="?", help=f"TOML file or preset (default: the run's own to --resume, {DEFAULT} otherwise)"
    )
    what.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)")
    where.add_argument("--out", type=Path, metavar="FOLDER", help="run folder (default: runs/CONFIG-DATE)")
    where.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    where.add_argument(
        "--init", type=Path, metavar="FILE.h5", help="start from the parameters of this checkpoint (default: random)"
    )
    where.add_argument(
        "--trace",
        type=int,
        nargs="?",
        const=20,
        metavar="STEPS",
        help="write a timeline of the first steps (default: none; 20 without a number)",
    )
    where.add_argument(
        "--plan", type=Path, metavar="FILE.toml", help="obey this saved plan (default: the setting plan.preset)"
    )


def run(args: argparse.Namespace) -> int:
    """Train; return 0 when done, 75 when stopped by a signal behind a checkpoint (collective)."""
    from hpcnn.comm.world import start

    with StopRequest() as request:  # a signal while the run is set up stops it after its first step
        world = start()
        try:
            code = _train(args, world, request)
        except HpcnnError:
            if world.size > 1:  # all of them are about to end
                request.retire()
            raise
        if code == EXIT_RUN_AGAIN:
            request.retire()
    return code


def _train(args: argparse.Namespace, world: World, request: StopRequest) -> int:
    if args.resume and args.out is None:
        raise ConfigError("train: --resume needs --out, the folder of the run to go on with.")
    source = args.config or _own_config(args) or DEFAULT
    with world.agreeing():
        traced = [] if args.trace is None else [f"log.trace_steps={args.trace}"]
        config = configuration.load(source, [*args.set, *traced])
    default = Path("runs") / f"{Path(source).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(world.broadcast_obj(str(args.out or default)))
    if config.separation.method == "rejection":
        return _train_classes(args, config, world, folder, request)
    with world.agreeing():
        plan_text = _read_plan(args.plan)
    recovery.check(config, world.size)
    num_planned = world.size - config.fault.spare_ranks

    def make(team: World, *, again: bool = False, kept: Checkpoint | None = None) -> Trainer:
        parts = assemble(config, team, plan_text if team.size == num_planned else None)
        try:
            with device_errors(config):
                streams: dict[str, TextIO] = {"progress_stream": sys.stderr, "result_stream": sys.stdout}
                trainer = Trainer(parts, folder, **streams, observers=_observers(parts))
                trainer.prepare(resume=again or args.resume, init=args.init, kept=kept)
                if not again:
                    _write_environment(team, parts, folder / "environment.json")
        except BaseException:
            parts.close()
            raise
        return trainer

    trainer, outcome = recovery.train(config, world, make, request)
    if trainer is not None:
        with closing(trainer.parts):
            if config.log.trace_steps:
                from hpcnn.report.trace import write_trace

                write_trace(trainer.world, trainer.timeline, folder / "trace.json")
        if trainer.world.rank == 0:
            print(outcome.describe())
    return EXIT_RUN_AGAIN if outcome.stopped else 0


def _train_classes(args: argparse.Namespace, config: Config, world: World, folder: Path, request: StopRequest) -> int:
    """Train a network for each class, and test them together if there are test images (collective)."""
    from hpcnn.train.class_networks import ClassNetworks, open_test

    for flag, given in (("--init", args.init), ("--plan", args.plan), ("--trace", config.log.trace_steps)):
        if given:
            raise ConfigError(
                f'train: {flag} is of one network, but separation.method = "rejection" trains one for each class.'
                " Leave it out."
            )
    networks = ClassNetworks(config, world, folder)
    try:
        with device_errors(config):
            stopped = networks.train(request, resume=args.resume, progress_stream=sys.stderr, result_stream=sys.stdout)
            score = None
            test_data = None if stopped else open_test(config, world)
            if test_data is not None:
                with test_data:
                    score = networks.test(test_data)
    finally:
        networks.close()
    if world.rank == 0:
        if stopped:
            print(f"stopped by {stopped}; go on with --resume --out {folder}")
        if score is not None:
            print(score.describe())
        print(f"run folder {folder}")
    return EXIT_RUN_AGAIN if stopped else 0


def _observers(parts: Parts) -> list[Observer]:
    """Return what looks on as the configuration asks (collective)."""
    if not parts.config.analysis.information_plane_every_steps:
        return []
    from hpcnn.analysis.information_plane import InformationPlane  # few runs want it

    return [InformationPlane(parts)]


def _own_config(args: argparse.Namespace) -> str | None:
    """Return the configuration that a run to resume was started with, if it is there."""
    saved = args.out / "config.toml" if args.resume else None
    return str(saved) if saved is not None and saved.exists() else None


def _read_plan(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return bounded.text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"train: cannot read the plan '{path}': {error}.") from None


def _write_environment(world: World, parts: Parts, path: Path) -> None:
    """Write what the run runs on, and by which command, for `hpcnn report` (collective)."""
    from hpcnn.cli.environment import ranges, usable_cores

    mine = {"host": world.hostnames[world.rank], "cores": ranges(usable_cores()), "threads": world.num_threads}
    ranks = world.gather_obj(mine)
    with world.agreeing():
        if ranks is not None:
            text = json.dumps(_environment(world, parts, ranks), indent=1) + "\n"
            try:
                with replacing(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            except OSError as error:
                raise ConfigError(
                    f"train: cannot write '{path}': {error.strerror}. Make the run folder writable or set --out."
                ) from None


def _environment(world: World, parts: Parts, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    from hpcnn.cli import environment, gpus
    from hpcnn.comm.library import load

    vendor, version = load().get_vendor()
    data, test_data = parts.train_data, parts.test_data
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "program": environment.program() | {"revision": environment.revision()},
        "hosts": environment.by_host(ranks),
        "nodes": list(world.engine.nodes),
        "mpi": f"{vendor} {'.'.join(map(str, version))}",
        "processor": environment.processor(),
        "gpus": gpus.devices() if parts.config.device == "cuda" else [],
        "operators": environment.operators(),
        "packages": {name: installed for name, installed in environment.packages().items() if installed},
        "variables": environment.blas()["variables"],
        "slurm": environment.slurm(),
        "data": {
            "image_shape": list(data.image_shape),
            "num_classes": data.num_classes,
            "train_images": len(data),
            "test_images": 0 if test_data is None else len(test_data),
        },
    }
