#!/usr/bin/env python3
"""Train LeNet-5 from several seeds and count how often the inequalities of the information plane fail.

    scripts/experiment_information_plane.py --seeds 1 2 3 --out runs/plane --document docs/experiments.md

Every seed is trained once for each way to choose kernels; weights and batches depend on the seed only. The table has
means and standard deviations over seeds. Activations are ReLU: the layers have no tanh.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

import numpy as np
from virtual import training
from virtual.shape import ClusterError

from hpcnn.analysis import plane
from hpcnn.analysis.plane_file import FILE, read

KERNELS: Mapping[str, Sequence[str]] = {
    "maps, silverman": (),
    "maps, silverman, hidden layers": ("analysis.layers=['conv1', 'conv2', 'fc1', 'fc2']",),
    "maps, quantile": ("analysis.width=quantile", "analysis.width_quantile=0.3"),
    "maps not widened, silverman": ("analysis.widen_joint=false",),
    "tensor, silverman": ("analysis.kernel=tensor", "analysis.maps_every=0"),
    "tensor, alignment": ("analysis.kernel=tensor", "analysis.maps_every=0", "analysis.width=alignment"),
}
HEAD = [
    *("kernels", "forward fails, %", "by at most, bits", "backward fails, %", "by at most, bits"),
    *("I(X;T) first, bits", "I(X;T) last", "I(T;Y) last", "its rise", "largest S / log2 N", "test accuracy"),
]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="in turn (1 2 3)")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS), metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--out", type=Path, default=Path("runs/information-plane"), help="folder of runs and pictures")
    parser.add_argument("--document", type=Path, help="write the table into its section 'information-plane'")
    return parser


def hpcnn(*words: str) -> None:
    """Run a command on one rank; raises ClusterError with the end of what it said, if it fails."""
    env = os.environ | {"PYTHONPATH": str(training.ROOT)}
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "hpcnn", *words]
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        training.check(done.returncode, f"hpcnn {words[0]}", log)


def numbers(run: Path) -> list[float]:
    """Return the numbers of one run, in the order of `HEAD`.

    Raises
    ------
    ClusterError
        If the run has recorded no plane.
    """
    found = read(run / FILE)
    if found is None:
        raise ClusterError(f"experiment: '{run}' has no information plane.")
    columns = found.columns
    inside = np.array(found.chain)
    forward = plane.violations(columns["I_x"][:, inside])
    backward = plane.violations(columns["errors/I_top"][:, inside[:-1]], grows=True)
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    told = columns["I_y"][:, -1]
    return [
        *(100 * forward.share, forward.worst, 100 * backward.share, backward.worst),
        *(columns["I_x"][-1, 0], columns["I_x"][-1, -1], told[-1], told[-1] - told[0]),
        *(columns["S"].max() / np.log2(found.attributes["samples"]), end["test_accuracy"]),
    ]


def measure(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Return the numbers of every kind of kernel, shape (seeds, numbers); runs that are there are not repeated."""
    found: dict[str, np.ndarray] = {}
    for name in args.kernels:
        rows = []
        for seed in args.seeds:
            run = args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            sets = [*args.set, *KERNELS[name], f"train.seed={seed}", "checkpoint.every_epochs=0"]
            if not (run / "final.h5").exists():
                changed = [word for one in sets for word in ("--set", one)]
                hpcnn("train", "information-plane", "--out", str(run), *changed)
                hpcnn("analyze", "information-plane", str(run))
            rows.append(numbers(run))
            print(name, seed, " ".join(f"{value:.3g}" for value in rows[-1]), flush=True)
        found[name] = np.array(rows)
    return found


def report(args: argparse.Namespace, found: Mapping[str, np.ndarray]) -> str:
    """Return the table and the line under it."""
    rows = [[name, *map(_cell, values.T)] for name, values in found.items()]
    settings = f" Changed settings: {', '.join(args.set)}." if args.set else ""
    return (
        f"{training.table([HEAD, *rows])}\n\n{training.machine()}; {datetime.now(UTC):%Y-%m-%d}. Preset"
        f" information-plane, seeds {', '.join(map(str, args.seeds))}: mean ± standard deviation. An inequality is"
        f" checked between neighbouring layers at every measurement.{settings}"
    )


def _cell(values: np.ndarray[Any, Any]) -> str:
    spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    return f"{values.mean():.3g}{spread}"


def main() -> int:
    """Train, measure and report; errors are one line."""
    args = make_parser().parse_args()
    return training.finish(
        "experiment_information_plane", lambda: report(args, measure(args)), args.document, "information-plane"
    )


if __name__ == "__main__":
    sys.exit(main())
