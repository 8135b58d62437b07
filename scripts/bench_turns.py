#!/usr/bin/env python3
"""Measure memory and time of layers that are computed tile after tile: yolo16 without batch norm, on one process.

Each case runs in a process of its own, whose largest resident set is what it held at most. "pools" are groups from one
pooling to the next (`plan.turns`), "one" is a single group of all layers before the last pooling.

    scripts/bench_turns.py --size 608 --cases 1x1 pools:2x2 pools:4x4 one:2x2 one:4x4
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

CASES = ["1x1", "pools:2x2", "pools:4x4", "one:2x2", "one:4x4"]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=608, help="rows and columns of the images (608)")
    parser.add_argument("--batch", type=int, default=1, help="images (1)")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not (3)")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="[GROUPS:]ROWSxCOLUMNS")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return what one case takes; runs in a process of its own, which imports what it needs."""
    import numpy as np

    from hpcnn import configuration
    from hpcnn.analysis.bench_step import TimedUpdate
    from hpcnn.comm import start
    from hpcnn.nn.model import Model
    from hpcnn.nn.models.yolo import yolo16
    from hpcnn.parallel.exchange import make_exchange
    from hpcnn.parallel.program import Program
    from hpcnn.plan.exchanges import choose_buckets
    from hpcnn.plan.planner import checked, in_turns, make_plan
    from hpcnn.train import optimizers

    groups, _, grid = args.case.rpartition(":")
    rows, columns = map(int, grid.split("x"))
    spec = yolo16((args.size, args.size, 3), 20, batchnorm=False)
    plan = in_turns(make_plan(spec, "data", 1, args.batch), spec, (rows, columns) if groups == "pools" else (1, 1))
    if groups == "one":
        names = [layer.name for layer in spec.layers[:-2]]
        plan = checked(replace(plan, fused=frozenset(names[1:]), turns=((names[-1], (rows, columns)),)), spec)
    world, settings = start(), configuration.load("yolo16")
    model = Model(spec, 1)
    buckets = choose_buckets(spec, "allreduce", bucket_bytes=4_000_000, ranks=1, global_batch=args.batch)
    exchange = make_exchange(settings.exchange, spec, plan, buckets, model.parameters, world)
    program = Program(model, plan, world, exchange)
    optimizer = optimizers.build(settings.train, model.parameters)
    draw = np.random.default_rng(1)
    images = draw.standard_normal((args.batch, *spec.input_shape)).astype(np.float32)
    labels = draw.integers(0, 20, args.batch)
    context = program.context(training=True, seed=1, step=0, samples=np.arange(args.batch), global_batch=args.batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps, losses = [], []
    for step in range(args.steps + 1):
        begin = time.perf_counter(), time.process_time()
        losses.append(program.train_step(images, labels, context, TimedUpdate(optimizer, step))[0])
        steps.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return {
        "before_mb": before * 1024 / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "step_s": float(np.median([wall for wall, _ in steps[1:]])),
        "fastest_s": min(wall for wall, _ in steps[1:]),
        "cpu_s": float(np.median([busy for _, busy in steps[1:]])),
        "loss": losses[0],
    }


def main() -> int:
    """Print a table, one row a case."""
    args = make_parser().parse_args()
    if args.case:
        print(json.dumps(measure(args)))
        return 0
    print("| turns | resident peak, MB | before the first step, MB | s a step | fastest | processor s | first loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in args.cases:
        command = [sys.executable, __file__, "--case", case]
        command += [f"--{key}={getattr(args, key)}" for key in ("size", "batch", "steps")]
        one = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        numbers = f"{one['step_s']:.2f} | {one['fastest_s']:.2f} | {one['cpu_s']:.2f} | {one['loss']:.5f}"
        print(f"| {case} | {one['peak_mb']:.0f} | {one['before_mb']:.0f} | {numbers} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
