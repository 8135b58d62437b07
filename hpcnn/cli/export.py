"""`hpcnn export`: a trained network as a file for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcnn import configuration
from hpcnn.cli.manual import Manual, explain
from hpcnn.train import checkpoint as checkpoints

MANUAL = Manual(
    """Writes a trained network as an ONNX file for other programs. It takes images as data sets hold them, bytes
    (N, H, W, C), any N at once, and gives logits; mean and deviation of the training images are inside. Needs
    hpcnn[onnx], and the data set of the run.""",
    examples=(
        ("hpcnn export runs/a --onnx lenet5.onnx", "the newest checkpoint of a run"),
        ("hpcnn export runs/a/final.h5 --onnx a.onnx --set data.source=data/cifar", "a data set that was moved"),
    ),
    files=(("FILE.onnx", "(--onnx) the network"),),
    see_also=("hpcnn evaluate", "hpcnn train"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("export", help="write a trained network as an ONNX file")
    explain(parser, MANUAL)
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint) or checkpoint file")
    parser.add_argument("--onnx", type=Path, required=True, metavar="FILE.onnx", help="the file to write (required)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the file and say what goes in and what comes out."""
    from hpcnn.train.export import export_onnx  # the layers: not for `--help`

    loaded = checkpoints.find(args.run)
    config = configuration.from_toml(loaded.config, f"the configuration in '{args.run}'", args.set)
    spec = export_onnx(args.onnx, loaded, config)
    height, width, channels = spec.input_shape
    print(
        f"{args.onnx}: {spec.name} after step {loaded.step}, {args.onnx.stat().st_size / 1e6:.1f} MB; takes images as"
        f" uint8 (N, {height}, {width}, {channels}), gives logits as float32 (N, {spec.num_classes})"
    )
    return 0
