"""Going on without ranks that died: what is left of the job starts again inside itself, from a state in memory.

A recovery is a resumed run: the ranks that are left form a world, plan for as many as they are, and restore a
checkpoint, which their `Keeper` puts together where `--resume` reads a file. Steps since then are made again. If copies
are missing, because ranks died together with those that kept theirs, it is the newest checkpoint of the run folder, or
the beginning. Ranks may die during all that: it counts once all that are left agree that it is done.

Spare ranks (`fault.spare_ranks`) are the last of the job. They hold nothing and wait for its end, or for an error: what
is left of the job is divided anew, so that the first of them train where others did before.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Protocol

from hpcnn.comm.failure import rank_failure, why_not_survivable
from hpcnn.comm.verdict import name_ranks
from hpcnn.comm.world import World
from hpcnn.config import Config
from hpcnn.errors import ConfigError, HpcnnError, RankFailure
from hpcnn.train.checkpoint import Checkpoint
from hpcnn.train.outcome import Outcome
from hpcnn.train.setup import device_errors
from hpcnn.train.signals import StopRequest
from hpcnn.train.trainer import Trainer

MOST_ATTEMPTS, NOTICE_S = 10, 1.0
"""How often, and how far apart, ranks that have met an error find out whether one of them is dead."""
TOGETHER_S = 5.0
"""How far apart ranks may be that raise the same error."""


def check(config: Config, num_ranks: int) -> None:
    """Raise ConfigError if the run is to go on without ranks that die, and library or number of ranks forbid it."""
    if config.fault.on_rank_failure == "stop":
        return
    reason = why_not_survivable()
    if reason:
        raise ConfigError(
            f"train: fault.on_rank_failure (='continue') needs user-level failure mitigation, but {reason}."
            ' Start the run by `mpirun --with-ft ulfm` of Open MPI 5, or set fault.on_rank_failure = "stop".'
        )
    spare = config.fault.spare_ranks
    if spare >= num_ranks:
        raise ConfigError(
            f"train: fault.spare_ranks (={spare}) leaves none of {num_ranks} ranks to train."
            " Start more ranks, or set fewer spare ones."
        )


class Make(Protocol):
    """Makes the trainer of a world, prepared: of a new run, or `again`, of one that lost ranks (collective)."""

    def __call__(self, world: World, /, *, again: bool = False, kept: Checkpoint | None = None) -> Trainer:
        """Return it; `kept` is the state to go on from, on rank 0, None if it is in the run folder."""


class Crew:
    """The ranks of a job: those that train, and behind them those that stand by (collective to make).

    Attributes
    ----------
    everyone : World
        All that are alive.
    working : World
        Those that train; on a rank that stands by, the others that do.
    stands_by : bool
        Whether this rank does.
    """

    def __init__(self, everyone: World, num_working: int, timeout_s: float) -> None:
        self._num_working, self._timeout_s = num_working, timeout_s
        self._join(everyone)

    def _join(self, everyone: World) -> None:
        self.everyone = everyone
        self.stands_by = everyone.rank >= self._num_working
        self.working = everyone if everyone.size <= self._num_working else everyone.split(int(self.stands_by))

    @property
    def reserve(self) -> tuple[int, ...]:
        """The ranks that stand by, by their names in the world of `start`."""
        return self.everyone.ranks[self._num_working :]

    def agree(self) -> None:
        """Return once the others are as far; ranks that stand by wait here, however long it takes (collective)."""
        if self.reserve:
            self.everyone.agree()

    def tell(self, error: Exception) -> None:
        """Have ranks that stand by raise what all others raise; one that raises it alone ends the job (`abort`)."""
        if self.reserve and not self.stands_by and isinstance(error, HpcnnError):
            with suppress(HpcnnError):
                self.everyone.agree(error, TOGETHER_S)

    def revoke(self) -> None:
        """Raise an error on all ranks that wait for anything."""
        self.everyone.revoke()
        if self.working is not self.everyone:
            self.working.revoke()

    def all_well(self, well: bool) -> bool:
        """Return whether no rank has died and all bring True; the same on all (collective, also when revoked)."""
        return self.everyone.all_well(well, self._timeout_s)

    def shrink(self) -> None:
        """Leave those that died behind (collective, after `revoke`); another death meanwhile is an error."""
        self.everyone = self.working = self.everyone.survivors(self._timeout_s)
        self._join(self.everyone)


def train(config: Config, world: World, make: Make, request: StopRequest) -> tuple[Trainer | None, Outcome]:
    """Train to the end, without ranks that die on the way if the configuration says so (collective).

    Parameters
    ----------
    make : callable
        Makes the first trainer, and one for every world of ranks that are left.
    request : StopRequest
        Listening.

    Returns
    -------
    Trainer
        The last one, whose world has the ranks that trained at the end; None on a rank that stands by.
    Outcome
        How it ended.

    Raises
    ------
    HpcnnError
        What `make` and `Trainer.train` raise; and what they do later, if the run cannot be set up for fewer ranks.
    """
    crew = Crew(world, world.size - config.fault.spare_ranks, config.exchange.timeout_seconds)
    survivable = config.fault.on_rank_failure == "continue"
    trainer: Trainer | None = None
    try:
        while True:
            outcome, failure = None, None
            try:
                if not crew.stands_by:
                    trainer = trainer or make(crew.working)
                    with device_errors(config):
                        outcome = trainer.train(request)
                crew.agree()
                if crew.reserve:
                    outcome = crew.everyone.broadcast_obj(outcome)
            except Exception as error:
                failure = rank_failure(error) if survivable else None
                if failure is None:
                    crew.tell(error)
                    raise
                crew.revoke()
            if (not survivable or crew.all_well(outcome is not None)) and outcome is not None:
                return trainer, outcome
            failure = failure or RankFailure("train: a rank died at the end of the run.")
            trainer = _recover(crew, trainer, failure, make)
    except BaseException:
        if trainer is not None:
            trainer.parts.close()
        raise


def _recover(crew: Crew, old: Trainer | None, failure: RankFailure, make: Make) -> Trainer | None:
    """Return the trainer of the ranks that are left, None if this one stands by; raise `failure` if none is dead.

    Collective among those that are left.
    """
    before, attempts = crew.everyone.ranks, 0
    stood_by = crew.reserve
    if old is not None:
        old.parts.close()
    while True:
        crew.revoke()
        new, kept, ready, died = None, None, False, True
        try:
            crew.shrink()
            died = crew.everyone.size < len(before)
            if died:
                kept = _collect(crew.everyone, old)
                if not crew.stands_by:
                    new = make(crew.working, again=True, kept=kept)
                crew.agree()
                ready = True
        except Exception as error:
            if rank_failure(error) is None:
                crew.tell(error)
                raise
            crew.revoke()
        if not died:  # the library knows of an error, but not yet of a death
            attempts += 1
            if attempts == MOST_ATTEMPTS:
                raise failure
            time.sleep(NOTICE_S)
        elif crew.all_well(ready):
            break
    if new is not None:
        lost = name_ranks(sorted(set(before) - set(crew.everyone.ranks)))
        moment = "the start" if old is None else old.world.watchdog.doing or "the start"
        took = sorted(set(stood_by) & set(crew.working.ranks))
        filled = f" {name_ranks(took)} stood by and take{'s' if len(took) == 1 else ''} part;" if took else ""
        source = "a copy in memory" if kept else "which was saved last"
        new.say(
            f"hpcnn: warning: {lost} died at {moment};{filled} {new.world.size} go on from step {new.step}, {source}."
        )
    return new


def _collect(everyone: World, old: Trainer | None) -> Checkpoint | None:
    """Return, on the first rank, the last state that those that trained have together, if any (collective)."""
    keeper = None if old is None else old.keeper
    veterans = everyone.split(int(keeper is not None))
    return None if keeper is None else keeper.collect(veterans)
