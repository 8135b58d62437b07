"""The run folder: opened once, by one rank, and never written over."""

from __future__ import annotations

from pathlib import Path

from hpcnn import configuration
from hpcnn.config import Config
from hpcnn.errors import ConfigError
from hpcnn.plan import planner
from hpcnn.plan.planner import Plan
from hpcnn.train.atomic import replacing
from hpcnn.train.checkpoint import Store


def open_folder(folder: Path, config: Config, plan: Plan, *, resume: bool) -> Store:
    """Make or re-open a run's folder, describe the run in it, and return where its checkpoints go.

    Raises
    ------
    ConfigError
        If it holds a run already and `resume` was not asked for, or cannot be written.
    """
    if (folder / "metrics.jsonl").exists() and not resume:
        raise ConfigError(
            f"train: '{folder}' holds a run already; runs are not overwritten."
            " Add --resume to go on with it, or choose another --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In one rename each: a full disk must not cost the run that goes on its configuration.
        for name, text in (("config.toml", configuration.to_toml(config)), ("plan.toml", planner.to_toml(plan))):
            with replacing(folder / name) as temporary:
                temporary.write_text(text)
    except OSError as error:
        raise ConfigError(f"train: cannot write the run folder '{folder}': {error.strerror}.") from None
    return Store(folder, config.checkpoint.keep)
