"""Scaling studies: which training runs compare ranks, plans, exchanges and algorithms, and what to expect of them.

A study is a folder with a folder for each run, see `scaling_point.py`. What is finished there is not run again, and
other settings for it are refused.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hpcnn import configuration
from hpcnn.analysis.forecast import forecast, model_of, read_plan
from hpcnn.analysis.scaling_point import PLAN, POINT, POINTS, SETTINGS, Point, plan_file, read_point, status
from hpcnn.config import Config
from hpcnn.errors import ConfigError, PlanError
from hpcnn.plan import planner
from hpcnn.plan.machine import load as load_machine
from hpcnn.plan.site import Site
from hpcnn.train.atomic import replacing

QUIET = (
    *("checkpoint.every_epochs=0", "checkpoint.every_steps=0", "checkpoint.final=false"),
    "log.evaluate_every_epochs=0",
)
"""Settings of a run that is only to show its speed: nothing is evaluated or saved."""

# The flags that decide on these keys; --set would be overruled by them.
DECIDED = {
    "train.steps": "--steps",
    "plan.preset": "--plans",
    "exchange.kind": "--exchanges",
    "exchange.algorithm": "--algorithms",
    "exchange.machine": "--machine",
}


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
        """Return the configuration that all points differ from, made for measuring: nothing is evaluated or saved."""
        for key in (override.partition("=")[0].strip() for override in self.overrides):
            if key in DECIDED:
                raise ConfigError(f"scale: --set {key} would be overruled; give {DECIDED[key]} instead.")
        config = configuration.load(self.source, [*QUIET, *self.overrides])
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
            file = plan_file(plan, ranks)
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


def prepare(study: Study, folder: Path) -> list[Point]:
    """Write the folders of a study's points, predictions included, and return the points.

    Raises
    ------
    ConfigError
        If a point is finished with other settings, before anything is written, or files cannot be written.
    PlanError
        If a file of a plan or machine cannot be read, or describes none.
    """
    ready: list[tuple[Point, str, str | None]] = []
    others = [read_point(file.parent) for file in (folder / POINTS).glob(f"*/{POINT}")]
    predicted: dict[str, tuple[float | None, str | None]] = {}
    for point, config in study.points(study.base()):
        _check_alike(folder, point, others)
        kind = dataclasses.replace(point, repeat=1).name
        if kind not in predicted:
            predicted[kind] = _predict(study, point, config)
        seconds, plan = predicted[kind]
        settings, home = configuration.to_toml(config), folder / POINTS / point.name
        if (home / POINT).exists() and status(home)[0] in ("finished", "running"):
            _check_same(home, settings, plan)
        ready.append((dataclasses.replace(point, predicted_step_s=seconds), settings, plan))
    for point, settings, plan in ready:
        home = folder / POINTS / point.name
        try:
            home.mkdir(parents=True, exist_ok=True)
            about = json.dumps(dataclasses.asdict(point), indent=1) + "\n"
            for name, text in ((SETTINGS, settings), (PLAN, plan), (POINT, about)):  # the last makes it a point
                if text is None:
                    (home / name).unlink(missing_ok=True)
                    continue
                with replacing(home / name) as temporary:
                    temporary.write_text(text)
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


def _check_alike(folder: Path, point: Point, others: Sequence[Point]) -> None:
    """Raise ConfigError if a study has points that `point` cannot stand in one table with."""
    for other in others:
        theirs, mine = ((one.global_batch // (one.ranks if one.mode == "weak" else 1)) for one in (other, point))
        if (other.model, theirs) != (point.model, mine):
            raise ConfigError(
                f"scale: '{folder}' is a study of {other.model} with train.global_batch {theirs}, and now it is"
                f" {point.model} with {mine}; a study has one of each. Choose another --out."
            )


def _check_same(home: Path, settings: str, plan: str | None) -> None:
    """Raise ConfigError if a finished point was given something else."""
    had = _flat(tomllib.loads((home / SETTINGS).read_text()))
    wants = _flat(tomllib.loads(settings))
    for key in sorted(had.keys() | wants.keys()):
        if had.get(key) != wants.get(key):
            raise ConfigError(
                f"scale: '{home}' has {key} = {had.get(key)!r}, and now it is {wants.get(key)!r}; what is"
                " finished or running is left alone. Choose another --out, or remove that folder."
            )
    if plan != ((home / PLAN).read_text() if (home / PLAN).exists() else None):
        raise ConfigError(
            f"scale: '{home}' has another plan than the one given or found now; what is finished or running is left"
            " alone. Choose another --out, or remove that folder."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
