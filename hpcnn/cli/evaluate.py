"""`hpcnn evaluate`: accuracy and loss of a finished run or of one checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from hpcnn import configuration
from hpcnn.cli.manual import Manual, explain
from hpcnn.config import AverageConfig, Config
from hpcnn.errors import ConfigError
from hpcnn.train import checkpoint as checkpoints

MANUAL = Manual(
    """Computes accuracy and loss of a trained network on all test images that its configuration names. The
    configuration is the one kept in the checkpoint; the ranks, on as many as there are, share the images.""",
    examples=(
        ("hpcnn evaluate runs/a", "the newest checkpoint of a run"),
        ("mpiexec -n 4 hpcnn evaluate runs/a/final.h5 --json", "one file, on four ranks"),
        ("hpcnn evaluate runs/a --set data.test=other.h5", "on other images"),
    ),
    see_also=("hpcnn train", "hpcnn data info"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("evaluate", help="measure a trained network on the test images")
    explain(parser, MANUAL)
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint) or checkpoint file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the sentence")


def run(args: argparse.Namespace) -> int:
    """Print the score; the configuration is the one kept in the checkpoint (collective)."""
    from hpcnn.comm.world import start
    from hpcnn.parallel.whole import Whole
    from hpcnn.train.evaluate import evaluate
    from hpcnn.train.setup import assemble, device_errors

    world = start()
    with world.agreeing():
        loaded = checkpoints.find(args.run) if world.rank == 0 else None
    text = world.broadcast_obj(None if loaded is None else loaded.config)
    config = _for_evaluation(configuration.from_toml(text, f"the configuration in '{args.run}'", args.set), world.size)
    parts = assemble(config, world)
    try:
        if parts.test_data is None:
            raise ConfigError("evaluate: no test images are configured; name a file with --set data.test=FILE.h5.")
        model, whole = parts.model, Whole(parts.model, parts.program.plan, world)
        room = whole.room({}, model.statistics)
        with world.agreeing():
            if loaded is not None:
                checkpoints.restore_into(
                    loaded, model=model.spec.name, parameters=room.parameters, statistics=room.statistics
                )
        for array in (room.parameters.values, *room.statistics.values()):
            world.broadcast(array)
        whole.take(room, {})
        with device_errors(config):
            score = evaluate(parts.program, parts.test_data, config.train.global_batch)
    finally:
        parts.close()
    if world.rank == 0:
        if args.json:
            print(json.dumps(dataclasses.asdict(score)))
        else:
            print(f"test accuracy {score.accuracy:.4f}, test loss {score.loss:.4f}, {score.num_samples} images")
    return 0


def _for_evaluation(config: Config, ranks: int) -> Config:
    """Return the configuration for one group of ranks, with a batch of at least one image a rank.

    A test has no batch size to be true to, and no replicas.
    """
    batch = max(config.train.global_batch, ranks)
    train, plan = dataclasses.replace(config.train, global_batch=batch), dataclasses.replace(config.plan, preset="data")
    return dataclasses.replace(config, train=train, plan=plan, average=AverageConfig())
