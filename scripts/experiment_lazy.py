#!/usr/bin/env python3
"""Compare lazy updates, and groups of ranks that are averaged now and then, with sums of gradients in every step.

    scripts/experiment_lazy.py --ranks 4 --seeds 1 2 3 --document docs/experiments.md

Four ways to train by a preset's recipe, on the built-in images unless `--set` says otherwise: all gradients travel in
every step; those of the lowest layers add up for four steps; for as many steps as the published rule finds; and two
groups train replicas that are averaged every ten steps. The table has the accuracy on the test images, how far the
replicas were from their average when they were measured, and what rank 0 sends in a step.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from experiment_mixing import make_parser, measure, report
from virtual import training

LAYERS = 13
"""Convolutions of ResNet-20 below its last third, where three quarters of the parameters are."""

LAZY = f"exchange.lazy_layers={LAYERS}"
WAYS: Mapping[str, Sequence[str]] = {
    "gradients in every step": (),
    f"lowest {LAYERS} every 4 steps": (LAZY, "exchange.lazy_steps=4"),
    f"lowest {LAYERS}, adapted": (LAZY, "exchange.lazy_steps=2", "exchange.lazy_adaptive=true"),
    "two groups, every 10 steps": ("average.rule=equal", "average.groups=2", "average.every_steps=10"),
}


def main() -> int:
    """Train and report; errors are one line."""
    args = make_parser(__doc__, "resnet20").parse_args()
    args.set = ["data.source=builtin", "train.epochs=8", "exchange.kind=sharded", *args.set]
    return training.study("experiment_lazy", args, lambda args: measure(args, WAYS), report, "lazy")


if __name__ == "__main__":
    sys.exit(main())
