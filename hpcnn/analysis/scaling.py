"""Scaling studies: training runs over numbers of ranks, plans, exchanges and algorithms, each in a folder of its own.

A study is a folder with `points/NAME/` for each run: `point.json` says what it is, `settings.toml` (and `given.toml`,
a plan to obey) what `hpcnn train` was given, `job.log` what the job said; beside them lies what a run writes.
Nothing else is remembered. A point is finished when its `metrics.jsonl` ends with the steps that it was to make; it is
then not run again, and other settings are refused. Any other point is run from the start.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal, TextIO

from hpcnn import config as configuration
from hpcnn.analysis import jobs
from hpcnn.analysis.forecast import forecast, model_of, read_plan
from hpcnn.config import Config
from hpcnn.errors import ConfigError, DataError, PlanError
from hpcnn.plan import planner
from hpcnn.plan.machine import load as load_machine
from hpcnn.plan.site import Site
from hpcnn.train import metrics
from hpcnn.train.atomic import replacing

POINTS, POINT, SETTINGS, PLAN, LOG, FAILURE, LOCK = (
    "points", "point.json", "settings.toml", "given.toml", "job.log", "failure.txt", "lock",
)  # fmt: skip
Status = Literal["finished", "failed", "running", "pending"]

# The flags that decide on these keys; --set would be overruled by them.
DECIDED = {
    "train.steps": "--steps",
    "plan.preset": "--plans",
    "exchange.kind": "--exchanges",
    "exchange.algorithm": "--algorithms",
    "exchange.machine": "--machine",
}


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
        return _file(self.plan, self.ranks)

    @property
    def name(self) -> str:
        """Name of its folder."""
        plan = Path(self.plan.replace("{ranks}", "")).stem.strip("-_.") if self.plan_file else self.plan
        return f"{self.mode}-{plan}-{self.exchange}-{self.algorithm}-{self.ranks}-{self.repeat}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What is to be compared, in the words of the command line.

    Attributes
    ----------
    source : str
        Preset or TOML file.
    overrides : sequence of str
        `--set`.
    ranks : sequence of int
        Numbers of ranks.
    plans, exchanges, algorithms : sequence of str
        Values of `plan.preset` or files of plans, of `exchange.kind` and of `exchange.algorithm`; none: the
        configuration's own. In names of files {ranks} stands for the number of ranks.
    mode : str
        "strong" or "weak", see `Point`.
    repeats, steps : int
        Runs of each point, and steps of each run.
    machine : str
        File of `hpcnn profile`, with {ranks} in its name or without, or "".
    ranks_per_node : int, optional
        For predictions; left out, as the machine was measured.
    """

    source: str
    overrides: Sequence[str] = ()
    ranks: Sequence[int] = (1,)
    plans: Sequence[str] = ()
    exchanges: Sequence[str] = ()
    algorithms: Sequence[str] = ()
    mode: str = "strong"
    repeats: int = 3
    steps: int = 12
    machine: str = ""
    ranks_per_node: int | None = None

    def base(self) -> Config:
        """Return the configuration that all points differ from, made for measuring: nothing is saved meanwhile."""
        for key in (override.partition("=")[0].strip() for override in self.overrides):
            if key in DECIDED:
                raise ConfigError(f"scale: --set {key} would be overruled; give {DECIDED[key]} instead.")
        quiet = ["checkpoint.every_epochs=0", "checkpoint.every_steps=0", "log.evaluate_every_epochs=0"]
        config = configuration.load(self.source, [*quiet, *self.overrides])
        data = config.data
        if Path(data.source).exists():  # jobs may start elsewhere
            data = dataclasses.replace(data, source=str(Path(data.source).resolve()))
        train = dataclasses.replace(config.train, steps=self.steps)
        return dataclasses.replace(config, data=data, train=train)

    def points(self, base: Config) -> list[tuple[Point, Config]]:
        """Return all runs with their configurations, one of each kind before the second of any.

        On one rank presets, exchanges and algorithms are the same, and run once.
        """
        found: dict[str, tuple[Point, Config]] = {}
        contenders = list(
            product(
                self.plans or (base.plan.preset,),
                self.exchanges or (base.exchange.kind,),
                self.algorithms or (base.exchange.algorithm,),
            )
        )
        for repeat, ranks, (plan, kind, algorithm) in product(
            range(1, self.repeats + 1), sorted(set(self.ranks)), contenders
        ):
            file = _file(plan, ranks)
            if ranks == 1:
                plan, kind, algorithm = plan if file and file.exists() else "data", "allreduce", "auto"
            config = self._configure(base, ranks, plan if file is None else "data", kind, algorithm)
            point = Point(
                model=config.model.name, mode=self.mode, plan=plan, exchange=kind, algorithm=algorithm,
                ranks=ranks, repeat=repeat, global_batch=config.train.global_batch,
            )  # fmt: skip
            other, _ = found.setdefault(point.name, (point, config))
            if other != point:
                raise ConfigError(
                    f"scale: the plans '{other.plan}' and '{point.plan}' would share the name '{point.name}'; names of"
                    " files must differ. Rename one."
                )
        return list(found.values())

    def _configure(self, base: Config, ranks: int, preset: str, kind: str, algorithm: str) -> Config:
        batch = base.train.global_batch * (ranks if self.mode == "weak" else 1)
        tree = dataclasses.asdict(base)
        tree["train"]["global_batch"] = batch
        tree["plan"]["preset"] = preset
        tree["exchange"] |= {"kind": kind, "algorithm": algorithm}
        if self.machine:
            tree["exchange"]["machine"] = str(Path(self.machine.replace("{ranks}", str(ranks))).resolve())
        if tree["data"]["source"] == "synthetic":
            tree["data"]["num_samples"] = max(batch, base.data.num_samples)
        return configuration.from_tree(tree)


def _file(plan: str, ranks: int) -> Path | None:
    return Path(plan.replace("{ranks}", str(ranks))) if plan.endswith(".toml") else None


def prepare(study: Study, folder: Path) -> list[Point]:
    """Write the folders of a study's points, predictions included, and return the points.

    Raises
    ------
    ConfigError
        If a point is finished with other settings, before anything is written, or files cannot be written.
    PlanError
        If a file of a plan or machine cannot be read, or describes none.
    """
    ready = []
    predicted: dict[str, tuple[float | None, str | None]] = {}
    for point, config in study.points(study.base()):
        kind = dataclasses.replace(point, repeat=1).name
        if kind not in predicted:
            predicted[kind] = _predict(study, point, config)
        seconds, plan = predicted[kind]
        settings, home = configuration.to_toml(config), folder / POINTS / point.name
        if (home / POINT).exists() and status(home)[0] == "finished":
            _check_same(home, settings, plan)
        ready.append((dataclasses.replace(point, predicted_step_s=seconds), settings, plan))
    for point, settings, plan in ready:
        home = folder / POINTS / point.name
        try:
            home.mkdir(parents=True, exist_ok=True)
            given = {POINT: json.dumps(dataclasses.asdict(point), indent=1) + "\n", SETTINGS: settings, PLAN: plan}
            for name, text in given.items():
                if text is not None:
                    (home / name).write_text(text)
                else:
                    (home / name).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"scale: cannot write '{home}': {error.strerror}. Choose another --out.") from None
    return [point for point, _, _ in ready]


def _predict(study: Study, point: Point, config: Config) -> tuple[float | None, str | None]:
    """Return the predicted step, None without a machine, and the plan to obey, None for a preset's."""
    text = read_plan(point.plan_file) if point.plan_file else None
    if not study.machine:
        return None, text
    machine = load_machine(config.exchange.machine)
    measured = machine.measured
    per_node = study.ranks_per_node or (-(-measured.ranks // measured.hosts) if measured else 1)
    site = Site.of(config, machine, tuple(rank // per_node for rank in range(point.ranks)))
    try:
        found = forecast(config, model_of(config), site, text)
    except PlanError:
        return None, text  # the run will say why, as one of the table's failures
    if config.plan.preset == "auto" and text is None:
        text = planner.to_toml(found.plan)  # as predicted, and looked for once
    return found.prediction.step_s, text


def _check_same(home: Path, settings: str, plan: str | None) -> None:
    """Raise ConfigError if a finished point was given something else."""
    had = _flat(tomllib.loads((home / SETTINGS).read_text()))
    wants = _flat(tomllib.loads(settings))
    for key in sorted(had.keys() | wants.keys()):
        if had.get(key) != wants.get(key):
            raise ConfigError(
                f"scale: '{home}' is finished with {key} = {had.get(key)!r}, and now it is {wants.get(key)!r}; what is"
                " finished is not run again. Choose another --out, or remove that folder."
            )
    if plan != ((home / PLAN).read_text() if (home / PLAN).exists() else None):
        raise ConfigError(
            f"scale: '{home}' is finished with another plan than the one given or found now; what is finished is not"
            " run again. Choose another --out, or remove that folder."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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
        for name in ("checkpoints", "final.h5"):  # weights of a few steps, as large as the model for each run
            _remove(home / name)
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
