#!/usr/bin/env python3
"""Disturb training runs at random moments, and see that none hangs, none loses a checkpoint, and all can be finished.

One run is left alone. Every other one gets a fault at a random moment: a signal to the launcher or to one rank, a
second signal, a stopped or killed rank, a killed launcher, a full or read-only disk. Then three things are held against
it: it has ended within the limit, with no process left; its newest checkpoint verifies; and `--resume` finishes it with
the parameters of the run that was left alone, to the bit. Full and read-only disks are small file systems in memory,
and left out where one is not root.

    scripts/chaos.py --runs 20                             # faults in turn, on 4 ranks
    scripts/chaos.py --runs 3 --faults kill-launcher --ranks 2 --seed 7
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the package, where it is not installed

import numpy as np

from hpcnn.cli.table import format_table
from hpcnn.errors import CheckpointError
from hpcnn.train import checkpoint as checkpoints

AGAIN = 75
WATCHDOG_S = 3.0
SETTINGS = (
    *("data.source=synthetic", "data.image_shape=[28,28,1]", "data.num_samples=600", "train.global_batch=24"),
    *("checkpoint.every_steps=4", "log.every_seconds=0", "train.check_every_steps=10"),
    f"exchange.timeout_seconds={WATCHDOG_S}",
)
CHECKPOINT_BYTES = 500_000  # of LeNet-5 with momentum: 2 * 4 * 61706, and the file's own
DISK_FAULTS = ("full-disk", "full-disk-go-on", "read-only")
FAULTS = (
    *("usr1", "usr1-rank", "term", "term-rank", "term-twice", "int", "stop-rank", "kill-rank", "kill-launcher"),
    *DISK_FAULTS,
)


@dataclass
class Report:
    """What became of one run."""

    fault: str
    moment: str
    code: int = 0
    seconds: float = 0.0
    saved_step: int = 0
    problem: str = ""


def main() -> int:
    """Run all faults; return 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(FAULTS), help="disturbed runs; faults take turns")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150, help="of every run")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the ranks that are hit")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a run may go on behind its fault")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--mpiexec", default=shutil.which("mpiexec") or "mpiexec")
    args = parser.parse_args()
    faults = [fault for fault in args.faults if os.geteuid() == 0 or fault not in DISK_FAULTS]
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="hpcnn-chaos-") as folder:
        chaos = Chaos(args, Path(folder))
        print(f"undisturbed: {chaos.calm_s:.1f} s, {args.ranks} ranks, {args.steps} steps", flush=True)
        reports = []
        for number in range(args.runs):
            report = chaos.disturb(faults[number % len(faults)], draw, Path(folder) / f"run{number}")
            reports.append(report)
            print(f"{number + 1}/{args.runs} {report.fault}: {report.problem or 'good'}", flush=True)
    rows = [
        [
            one.fault,
            one.moment,
            str(one.code),
            f"{one.seconds:.1f}",
            str(one.saved_step),
            one.problem or "good",
        ]
        for one in reports
    ]
    print(format_table(["fault", "at", "code", "ended in s", "saved step", "verdict"], rows))
    return int(any(report.problem for report in reports))


class Chaos:
    """Runs training jobs and disturbs them.

    Parameters
    ----------
    args : Namespace
        The command line.
    folder : Path
        For the undisturbed run.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        begin = time.monotonic()
        with (folder / "calm.log").open("w") as log:
            code = self.start(folder / "calm", log).wait(300)
        if code:
            raise SystemExit(f"the undisturbed run failed:\n{(folder / 'calm.log').read_text()}")
        self.calm_s = time.monotonic() - begin
        self.wanted = checkpoints.load(folder / "calm" / "final.h5").parameters

    def start(self, out: Path, log: object, *settings: str, resume: bool = False) -> subprocess.Popen:
        """Start a job in a session of its own."""
        words = [word for one in (f"train.steps={self.args.steps}", *SETTINGS, *settings) for word in ("--set", one)]
        job = [self.args.mpiexec, "-n", str(self.args.ranks), sys.executable, "-m", "hpcnn", "train", "lenet5"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        return subprocess.Popen(
            [*job, "--out", str(out), *words, *(["--resume"] if resume else [])],
            stdin=subprocess.DEVNULL,
            stdout=log,  # type: ignore[call-overload]
            stderr=log,
            env=environment,
            start_new_session=True,
        )

    def disturb(self, fault: str, draw: random.Random, folder: Path) -> Report:
        """Start a run, disturb it, and hold against it what must be true."""
        after_s, step = draw.uniform(0.1, 0.5) * self.calm_s, draw.randrange(1, self.args.steps)
        if fault == "stop-rank" or draw.random() < 0.75:  # the watchdog needs MPI, which is not there from the start
            after_s = 0.0
        else:
            step = 0
        report = Report(fault, f"{after_s:.1f} s" if after_s else f"step {step}")
        folder.mkdir()
        with disk(folder, fault, draw) as out, (folder / "log").open("w") as log:
            settings = ("checkpoint.on_error=continue",) if fault == "full-disk-go-on" else ()
            job = self.start(out, log, *settings)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(after_s)
            while job.poll() is None and steps_made(out) < step:
                time.sleep(0.01)
            begin = time.monotonic()
            strike(fault, job, draw, out, self.args.ranks)
            report.problem = self.wait(job)
            report.code, report.seconds = job.returncode or 0, time.monotonic() - begin
            heal(fault, out)
            report.problem = report.problem or self.judge(report, out, folder / "log")
            report.problem = report.problem or self.resume(out, log, folder / "log")
        return report

    def wait(self, job: subprocess.Popen) -> str:
        """Return once the job and all of its processes are gone, or what is wrong."""
        deadline = time.monotonic() + self.args.limit + self.calm_s
        while time.monotonic() < deadline:
            if job.poll() is not None and not members(job.pid):
                return ""
            time.sleep(0.05)
        left = members(job.pid)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()
        return f"still running after {self.args.limit:.0f} s: {len(left)} processes"

    def judge(self, report: Report, out: Path, log: Path) -> str:
        """Return what is wrong with the exit code or the checkpoints."""
        text = log.read_text(errors="replace")
        if "Traceback" in text:
            return f"a traceback: {text[text.index('Traceback') :][:1500]!r}"
        try:
            found = checkpoints.latest(out) if out.is_dir() else None
        except CheckpointError as error:
            return f"no good checkpoint: {error}"
        report.saved_step = found.checkpoint.step if found is not None else 0
        if found is not None and found.warning:
            return f"a damaged checkpoint: {found.warning}"
        finished = (out / "final.h5").exists()
        soft = report.fault.startswith(("usr1", "term-rank")) or report.fault == "term"
        if report.code == 0 and not finished:
            return "ended with code 0 and is not finished"
        if soft and report.code not in (0, AGAIN) and out.exists():  # before that, Python itself was still starting
            return f"asked to stop, it ended with code {report.code}: {text[-300:]!r}"
        if report.code == AGAIN and not report.saved_step:
            return "says that it can be run again, and has saved nothing"
        return ""

    def resume(self, out: Path, log: object, text: Path) -> str:
        """Finish the run; return what is wrong."""
        job = self.start(out, log, resume=True)
        problem = self.wait(job)
        if problem or job.returncode:
            return problem or f"cannot be resumed: {text.read_text(errors='replace')[-300:]!r}"
        final = checkpoints.load(out / "final.h5").parameters
        differ = [name for name, tensor in self.wanted.items() if not np.array_equal(tensor, final[name])]
        leftovers = [path.name for path in out.rglob(".*.tmp")]
        return (f"other parameters: {differ}" if differ else "") or (f"left over: {leftovers}" if leftovers else "")


def steps_made(out: Path) -> int:
    """Return how many steps a run has recorded."""
    with contextlib.suppress(OSError):
        return (out / "metrics.jsonl").read_bytes().count(b'"step", "step"')
    return 0


def strike(fault: str, job: subprocess.Popen, draw: random.Random, out: Path, ranks: int) -> None:
    """Do it, unless the run has ended."""
    pids = [pid for pid in members(job.pid) if is_rank(pid)]
    rank = draw.choice(pids) if len(pids) == ranks else job.pid
    kinds = {
        "usr1": (job.pid, signal.SIGUSR1),
        "usr1-rank": (rank, signal.SIGUSR1),
        "term-rank": (rank, signal.SIGTERM),
        "int": (job.pid, signal.SIGINT),
        "stop-rank": (rank, signal.SIGSTOP),
        "kill-rank": (rank, signal.SIGKILL),
        "kill-launcher": (job.pid, signal.SIGKILL),
    }
    if fault in kinds:
        send(*kinds[fault])
    elif fault.startswith("term"):  # as batch systems do, to every process of the step
        for pid in pids:
            send(pid, signal.SIGTERM)
        if fault == "term-twice":
            time.sleep(1.0 + draw.random())
            for pid in pids:
                send(pid, signal.SIGTERM)
    elif fault == "read-only":
        mount = ["mount", "-o", "remount,ro", str(place_of(fault, out))]
        for _ in range(100):  # refused while a file is open for writing
            if subprocess.run(mount, check=False, capture_output=True).returncode == 0:
                break
            time.sleep(0.01)


@contextlib.contextmanager
def disk(folder: Path, fault: str, draw: random.Random) -> Iterator[Path]:
    """Yield where the run writes."""
    if fault not in DISK_FAULTS:
        yield folder / "out"
    else:
        out = folder / "out" if fault == "read-only" else folder / "disk" / "out"
        place = place_of(fault, out)
        place.mkdir(parents=True)
        size = int(draw.uniform(0.1, 5.0) * CHECKPOINT_BYTES) if fault != "read-only" else 20 * CHECKPOINT_BYTES
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", str(place)], check=True)
        try:
            yield out
        finally:
            subprocess.run(["umount", "-l", str(place)], check=False)


def heal(fault: str, out: Path) -> None:
    """Give a small or read-only disk room again."""
    if fault in DISK_FAULTS:
        size = f"remount,rw,size={40 * CHECKPOINT_BYTES}"
        subprocess.run(["mount", "-o", size, str(place_of(fault, out))], check=True)


def place_of(fault: str, out: Path) -> Path:
    """Return where a run's disk is mounted; a read-only one has only checkpoints, which are not open for long."""
    return out / "checkpoints" if fault == "read-only" else out.parent


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def members(root: int) -> list[int]:
    """Return the processes that descend from one, or are of its session: launchers make sessions of their own."""
    parents, sessions = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z":
                    parents[int(entry.name)], sessions[int(entry.name)] = int(parent), int(session)
    _known.setdefault(root, {root})
    known = _known[root]
    while new := {pid for pid in parents if pid not in known and (parents[pid] in known or sessions[pid] in known)}:
        known |= new
    return sorted(known & parents.keys())


_known: dict[int, set[int]] = {}
"""Processes that have been seen of each job: orphans are still its own."""


def is_rank(pid: int) -> bool:
    """Whether a process runs hpcnn itself, rather than launching it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return words[:3] == [sys.executable.encode(), b"-m", b"hpcnn"]


if __name__ == "__main__":
    sys.exit(main())
