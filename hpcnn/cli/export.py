"""`hpcnn export`: a trained network as a file for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcnn import configuration
from hpcnn.train import checkpoint as checkpoints


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("export", help="write a trained network as an ONNX file")
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint) or checkpoint file")
    parser.add_argument("--onnx", type=Path, required=True, metavar="FILE.onnx", help="the file to write")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")


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
