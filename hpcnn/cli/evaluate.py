"""`hpcnn evaluate`: accuracy and loss of a finished run or of one checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcnn import bounded, configuration
from hpcnn.cli.manual import Manual, explain
from hpcnn.config import AverageConfig, Config
from hpcnn.errors import CheckpointError, ConfigError
from hpcnn.train import checkpoint as checkpoints

if TYPE_CHECKING:
    from hpcnn.comm.world import World
    from hpcnn.train.separation import SeparationScore

NO_TEST_IMAGES = "evaluate: no test images are configured; name a file with --set data.test=FILE.h5."

MANUAL = Manual(
    """Computes accuracy and loss of a trained network on all test images that its configuration names. The
    configuration is the one kept in the checkpoint; the ranks, on as many as there are, share the images. Where classes
    were kept apart ([separation]), it says how well subspaces of features tell images apart; of a run with a network
    for each class it asks all of them.""",
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

    world = start()
    text, loaded = "", None
    with world.agreeing():
        if world.rank == 0:
            text = _text_of_classes(args.run)
            loaded = None if text else checkpoints.find(args.run)
    of_classes, text = world.broadcast_obj((bool(text), text if loaded is None else loaded.config))
    config = _for_evaluation(configuration.from_toml(text, f"the configuration in '{args.run}'", args.set), world.size)
    if config.separation.method == "rejection" and not of_classes:
        raise ConfigError(f"evaluate: '{args.run}' is the network of one class; name the folder of the whole run.")
    words, numbers = (_classes if of_classes else _network)(args.run, config, world, loaded)
    if world.rank == 0:
        print(json.dumps(numbers) if args.json else words)
    return 0


def _network(
    path: Path, config: Config, world: World, loaded: checkpoints.Checkpoint | None
) -> tuple[str, dict[str, Any]]:
    """Return the score of one network in words and in numbers (collective)."""
    from hpcnn.train.evaluate import evaluate, restore
    from hpcnn.train.separation import measure_separation
    from hpcnn.train.setup import assemble, device_errors

    parts = assemble(config, world)
    try:
        if parts.test_data is None:
            raise ConfigError(NO_TEST_IMAGES)
        restore(parts, loaded)
        with device_errors(config):
            score = evaluate(parts.program, parts.test_data, config.train.global_batch)
            apart = None if config.separation.method == "none" else measure_separation(parts, parts.test_data)
    finally:
        parts.close()
    words = f"test accuracy {score.accuracy:.4f}, test loss {score.loss:.4f}, {score.num_samples} images"
    numbers = dataclasses.asdict(score)
    if apart is not None:
        words += "\n" + _describe(apart)
        numbers["separation"] = dataclasses.asdict(apart)
    return words, numbers


def _classes(
    path: Path, config: Config, world: World, loaded: checkpoints.Checkpoint | None
) -> tuple[str, dict[str, Any]]:
    """Return the score of the networks of all classes in words and in numbers (collective)."""
    from hpcnn.train.class_networks import ClassNetworks, open_test
    from hpcnn.train.setup import device_errors

    test_data = open_test(config, world)
    if test_data is None:
        raise ConfigError(NO_TEST_IMAGES)
    networks = ClassNetworks(config, world, path)
    try:
        with test_data, device_errors(config):
            score = networks.test(test_data)
    finally:
        networks.close()
    return score.describe(), dataclasses.asdict(score)


def _describe(apart: SeparationScore) -> str:
    """Return the measures, and a table of the angles between classes in degrees."""
    from hpcnn.cli.table import format_table

    header = ["angle", *map(str, range(len(apart.angles)))]
    rows = [[str(index), *(f"{angle:.1f}" for angle in row)] for index, row in enumerate(apart.angles)]
    return (
        f"accuracy by the smallest rejection {apart.rejection_accuracy:.4f}\n"
        f"distance of a class's subspace from the sum of the others {apart.geodesic:.3f} geodesic, {apart.chordal:.3f}"
        f" chordal (0: within it, 1: at right angles)\n"
        f"smallest angle of two classes {apart.mean_angle:.1f} degrees in the mean\n\n{format_table(header, rows)}"
    )


def _text_of_classes(path: Path) -> str:
    """Return the configuration of a run with a network for each class, "" if it is none."""
    own = path / "config.toml"
    if not own.is_file() or not any(path.glob("class-*")):
        return ""
    try:
        return bounded.text(own)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"evaluate: cannot read '{own}': {error}.") from None


def _for_evaluation(config: Config, ranks: int) -> Config:
    """Return the configuration for one group of ranks, with a batch of at least one image a rank.

    A test has no batch size to be true to, and no replicas.
    """
    batch = max(config.train.global_batch, ranks)
    train, plan = dataclasses.replace(config.train, global_batch=batch), dataclasses.replace(config.plan, preset="data")
    return dataclasses.replace(config, train=train, plan=plan, average=AverageConfig())
