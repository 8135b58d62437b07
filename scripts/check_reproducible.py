#!/usr/bin/env python3
"""Train reproducibly on 1, 2, ... ranks of this host, by both exchanges, and compare the bits of what comes out.

    scripts/check_reproducible.py lenet5 resnet20 --steps 20 --ranks 1 2 3 4 5 6 7 8

Of every run it prints the SHA-256 of all parameters, and of everything: optimizer state, statistics, and the loss and
accuracy of each step. One more run by each exchange begins on 4 ranks and goes on from the checkpoint in its middle on
3. It ends with code 1 unless all are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from virtual import training
from virtual.launch import find_launcher

from hpcnn.train import checkpoint as checkpoints

KINDS = ("allreduce", "sharded")
HEAD = ["model", "exchange", "ranks", "parameters", "everything", "median step"]
RECORDED = ("event", "step", "loss", "accuracy", "test_loss", "test_accuracy")
BEFORE, AFTER = 4, 3


@dataclass(frozen=True)
class Run:
    """What a run left."""

    model: str
    kind: str
    ranks: str
    parameters: str
    everything: str
    step_s: float

    @property
    def row(self) -> list[str]:
        """For the table."""
        digests = [self.parameters[:16], self.everything[:16]]
        return [self.model, self.kind, self.ranks, *digests, f"{1e3 * self.step_s:.1f} ms"]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["lenet5", "resnet20"], help="presets or files (lenet5 resnet20)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=list(range(1, 9)), metavar="N", help="in turn (1 ... 8)"
    )
    parser.add_argument("--steps", type=int, default=20, help="of each run, an even number (20)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    return parser


def train(folder: Path, model: str, ranks: int, settings: Sequence[str], *, resume: bool = False) -> None:
    """Train on this host, one thread a rank; raises ClusterError with the end of what the run said, if it fails."""
    launcher = [] if ranks == 1 else [find_launcher("auto")[1], "-n", str(ranks)]
    sets = [word for setting in settings for word in ("--set", setting)]
    command = [*launcher, sys.executable, "-m", "hpcnn", "train", model, *sets, "--out", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(training.ROOT)}
    with open(folder.with_suffix(".log"), "w+") as log:
        words = [*command, *(["--resume"] if resume else [])]
        done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        training.check(done.returncode, "hpcnn train", log)


def forget_after(folder: Path, step: int) -> None:
    """Leave a run as it was after so many steps, when a checkpoint was written."""
    (folder / "final.h5").unlink()
    (folder / "best.h5").unlink(missing_ok=True)
    for path in (folder / "checkpoints").iterdir():
        if path.name != f"step-{step:08d}.h5":
            path.unlink()


def digests(folder: Path) -> tuple[str, str, float]:
    """Return the digests of the parameters and of everything, and the median seconds of a step."""
    final = checkpoints.load(folder / "final.h5")
    groups = {"parameters": final.parameters, "statistics": final.statistics, **final.optimizer}
    every, parameters = hashlib.sha256(), hashlib.sha256()
    for group, tensors in sorted(groups.items()):
        for name, tensor in sorted(tensors.items()):
            every.update(f"{group}/{name}".encode() + tensor.tobytes())
            if group == "parameters":
                parameters.update(name.encode() + tensor.tobytes())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    every.update(repr([[record.get(name) for name in RECORDED] for record in records]).encode())
    seconds = statistics.median(record["step_s"] for record in records if record["event"] == "step")
    return parameters.hexdigest(), every.hexdigest(), seconds


def measure(args: argparse.Namespace) -> list[Run]:
    """Return what every run left, having printed it."""
    common = ["train.reproducible=true", f"train.steps={args.steps}", f"checkpoint.every_steps={args.steps // 2}"]
    found = []
    with tempfile.TemporaryDirectory(prefix="check-") as place:
        for model in args.models:
            for kind in KINDS:
                settings = [*common, f"exchange.kind={kind}", "checkpoint.keep=9", *args.set]
                for ranks in (*args.ranks, 0):
                    folder = Path(place) / f"{len(found)}"
                    train(folder, model, ranks or BEFORE, settings)
                    if not ranks:
                        forget_after(folder, args.steps // 2)
                        train(folder, model, AFTER, settings, resume=True)
                    found.append(Run(model, kind, str(ranks) if ranks else f"{BEFORE}, {AFTER}", *digests(folder)))
                    print(" ".join(found[-1].row), flush=True)
    return found


def main() -> int:
    """Train and compare; errors are one line."""
    args = make_parser().parse_args()
    found: list[Run] = []

    def work() -> str:
        found.extend(measure(args))
        return f"{training.table([HEAD, *(run.row for run in found)])}\n\n{training.machine()}."

    code = training.finish("check_reproducible", work, None, "")
    different = [model for model in args.models if len({run.everything for run in found if run.model == model}) > 1]
    for model in different:
        print(f"check_reproducible: the runs of {model} differ.", file=sys.stderr)
    return code or int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
