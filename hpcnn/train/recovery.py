"""Going on without ranks that died: what is left of the job starts again inside itself, from a state in memory.

A recovery is a resumed run: the ranks that are left form a world, plan for as many as they are, and restore a
checkpoint, which their `Keeper` puts together where `--resume` reads a file. Steps since then are made again. If copies
are missing, because ranks died together with those that kept theirs, it is the newest checkpoint of the run folder, or
the beginning. Ranks may die during all that: it counts once all that are left agree that it is done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

from hpcnn.comm.failure import rank_failure, why_not_survivable
from hpcnn.comm.verdict import name_ranks
from hpcnn.comm.world import World
from hpcnn.config import Config
from hpcnn.errors import ConfigError, RankFailure
from hpcnn.train.observer import Observer
from hpcnn.train.outcome import Outcome
from hpcnn.train.setup import Parts, assemble
from hpcnn.train.signals import StopRequest
from hpcnn.train.trainer import Trainer

MOST_ATTEMPTS, NOTICE_S = 10, 1.0
"""How often, and how far apart, ranks that have met an error find out whether one of them is dead."""


def check(config: Config) -> None:
    """Raise ConfigError if the run is to go on without ranks that die, and the MPI library cannot."""
    reason = why_not_survivable() if config.fault.on_rank_failure == "continue" else ""
    if reason:
        raise ConfigError(
            f"train: fault.on_rank_failure (='continue') needs user-level failure mitigation, but {reason}."
            ' Start the run by `mpirun --with-ft ulfm` of Open MPI 5, or set fault.on_rank_failure = "stop".'
        )


def train(
    trainer: Trainer,
    init: Path | None = None,
    observers: Callable[[Parts], Sequence[Observer]] = lambda parts: (),
    request: StopRequest | None = None,
) -> tuple[Trainer, Outcome]:
    """Train to the end, without ranks that die on the way if the configuration says so (collective).

    Parameters
    ----------
    trainer : Trainer
        Prepared.
    init : Path, optional
        What the run began with; it begins with it again if nothing else is left of it.
    observers : callable
        Makes those of a trainer, as they were made for the first.
    request : StopRequest, optional
        Already listening; left out, signals are listened to from here on.

    Returns
    -------
    Trainer
        The last one, whose world has the ranks that are left.
    Outcome
        How it ended.

    Raises
    ------
    HpcnnError
        What `Trainer.train` raises; and what the first steps of a run do, if it cannot be set up for fewer ranks.
    """
    with StopRequest() if request is None else nullcontext(request) as listening:
        if trainer.config.fault.on_rank_failure == "stop":
            return trainer, trainer.train(listening)
        while True:
            outcome, failure = None, None
            try:
                outcome = trainer.train(listening)
            except Exception as error:
                failure = rank_failure(error)
                if failure is None:
                    raise
                trainer.world.revoke()
            if trainer.world.all_well(outcome is not None) and outcome is not None:
                return trainer, outcome
            failure = failure or RankFailure("train: a rank died at the end of the run.")
            trainer = _recover(trainer, failure, lambda old, world: _again(old, world, init, observers))


def _recover(old: Trainer, failure: RankFailure, again: Callable[[Trainer, World], Trainer]) -> Trainer:
    """Return a trainer for the ranks that are left (collective among them); `failure` is raised if all are."""
    world, attempts = old.world, 0
    old.parts.close()
    while True:
        world.revoke()
        world = world.survivors()
        if world.size == old.world.size:  # the library knows of an error, but not yet of a death
            attempts += 1
            if attempts == MOST_ATTEMPTS:
                raise failure
            time.sleep(NOTICE_S)
            continue
        new = None
        try:
            new = again(old, world)
        except Exception as error:
            if rank_failure(error) is None:
                raise
            world.revoke()
        if world.all_well(new is not None) and new is not None:
            return new


def _again(old: Trainer, world: World, init: Path | None, observers: Callable[[Parts], Sequence[Observer]]) -> Trainer:
    """Return a trainer for `world`, in the last state of `old` that is to be had (collective)."""
    kept = old.keeper.collect(world) if old.keeper is not None else None
    parts = assemble(old.config, world)
    streams: dict[str, TextIO] = {"progress_stream": sys.stderr, "result_stream": sys.stdout}
    new = Trainer(parts, old.folder, **streams, observers=observers(parts))
    new.prepare(resume=True, init=init, kept=kept)
    lost = sorted(set(old.world.ranks) - set(world.ranks))
    new.say(
        f"hpcnn: warning: {name_ranks(lost)} died at {old.world.watchdog.doing or 'the start'};"
        f" {len(world.ranks)} go on from step {new.step}, {'a copy in memory' if kept else 'which was saved last'}."
    )
    return new
