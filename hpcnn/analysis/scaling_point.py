"""One run of a scaling study: what it is, the folder that it lives in, how it stands there, and how it is run.

The folder `points/NAME/` has `point.json`, which says what the run is, `settings.toml` (and `given.toml`, a plan to
obey), which `hpcnn train` is given, and `job.log`, which the job writes; beside them lies what a run leaves. Nothing
else is remembered. A point is finished when its `metrics.jsonl` ends with the steps that it was to make; any other is
run from the start.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

from hpcnn.analysis import jobs
from hpcnn.errors import DataError
from hpcnn.train import metrics
from hpcnn.train.atomic import replacing

POINTS, POINT, SETTINGS, PLAN, LOG, FAILURE, LOCK = (
    "points", "point.json", "settings.toml", "given.toml", "job.log", "failure.txt", "lock",
)  # fmt: skip
Status = Literal["finished", "failed", "running", "pending"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a study."""

    model: str
    mode: str
    """"strong": the same global batch on all numbers of ranks. "weak": so many samples for each rank."""
    plan: str
    """A preset, or the file of a saved plan, in whose name {ranks} stands for the number of ranks."""
    exchange: str
    algorithm: str
    ranks: int
    repeat: int
    """From 1."""
    global_batch: int
    predicted_step_s: float | None = None
    """None without a machine file."""

    @property
    def plan_file(self) -> Path | None:
        """The saved plan to obey; None for a preset."""
        return plan_file(self.plan, self.ranks)

    @property
    def name(self) -> str:
        """Name of its folder."""
        plan = Path(self.plan.replace("{ranks}", "")).stem.strip("-_.") if self.plan_file else self.plan
        return f"{self.mode}-{plan}-{self.exchange}-{self.algorithm}-{self.ranks}-{self.repeat}"


def plan_file(plan: str, ranks: int) -> Path | None:
    """Return the file that a plan of this name is read from; None for a preset."""
    return Path(plan.replace("{ranks}", str(ranks))) if plan.endswith(".toml") else None


def status(home: Path) -> tuple[Status, str]:
    """Return how a point stands, and why it failed."""
    if not (home / FAILURE).exists() and _is_complete(home):
        return "finished", ""
    if (home / LOCK).exists():
        with (home / LOCK).open("r+") as lock:
            if not _lock(lock):
                return "running", ""
    if (home / FAILURE).exists():
        return "failed", (home / FAILURE).read_text().strip()
    return "pending", ""


def _is_complete(home: Path) -> bool:
    """Return whether all steps of a point were made, by as many ranks as it is to have."""
    if not (home / metrics.FILE).exists():
        return False
    last = (metrics.read(home / metrics.FILE) or [{}])[-1]
    if last.get("event") != "end" or last.get("stopped"):
        return False
    steps = tomllib.loads((home / SETTINGS).read_text())["train"]["steps"]
    return bool(last["step"] == steps and _ranks(home) == read_point(home).ranks)


def _ranks(home: Path) -> int:
    """Return by how many ranks the run in a folder was made, 0 if it has not come to begin."""
    file = home / "plan.toml"
    return int(tomllib.loads(file.read_text())["ranks"]) if file.exists() else 0


def run(home: Path, launcher: jobs.Launcher, limit_s: float) -> tuple[Status, str]:
    """Run a point unless it is finished or somebody runs it, and return how it then stands.

    Parameters
    ----------
    home : Path
        The point's folder.
    launcher : Launcher
        Starts its ranks.
    limit_s : float
        Seconds after which the job is ended.
    """
    point = read_point(home)
    with _locked(home) as free:
        if not free:
            return "running", ""
        if status(home)[0] == "finished":
            return "finished", ""
        _clear(home)
        command = [*launcher.command(point.ranks), sys.executable, "-m", "hpcnn", "train", str(home / SETTINGS)]
        command += ["--out", str(home)] + (["--plan", str(home / PLAN)] if (home / PLAN).exists() else [])
        reason = jobs.run(command, home / LOG, limit_s)
        if not reason and not _is_complete(home):
            reason = f"the job ended before its steps were made: {jobs.last_words(home / LOG)}"
            if _ranks(home) not in (0, point.ranks):
                reason = f"a job of {_ranks(home)} rank(s), not {point.ranks}: the launcher is of another MPI library"
        for weights in (home / "checkpoints", *home.glob("*.h5")):  # of a few steps, and as large as the model each
            _remove(weights)
        if reason:
            with replacing(home / FAILURE) as temporary:
                temporary.write_text(reason + "\n")
            return "failed", reason
        return "finished", ""


@contextmanager
def _locked(home: Path) -> Iterator[bool]:
    """Yield whether nobody else runs this point."""
    with (home / LOCK).open("w") as lock:
        yield _lock(lock)
    # Unlocked by closing. The file stays: removing it would let two processes lock two files of this name.


def _lock(file: TextIO) -> bool:
    """Lock a file and return True, or return False where another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _clear(home: Path) -> None:
    """Remove what an earlier attempt has left."""
    for entry in home.iterdir():
        if entry.name not in (POINT, SETTINGS, PLAN, LOCK):
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_point(home: Path) -> Point:
    """Return the point of a folder; raises DataError where it has none."""
    try:
        return Point(**json.loads((home / POINT).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"scale: '{home}' is no point of a study ({error}). Run `hpcnn scale CONFIG --out` its study's folder."
        ) from None
