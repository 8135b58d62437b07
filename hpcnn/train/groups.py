"""Groups of ranks, each of which trains a replica of the network: who they are, and which images each group sees.

Inside a group everything is as it is without groups, on the group's own world. Ranks that have the same place in their
groups have the same part of the network; across the groups, replicas are combined between such ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from hpcnn.comm.counters import Communication
from hpcnn.comm.world import World
from hpcnn.config import AverageConfig, Config
from hpcnn.data.sampler import steps_per_epoch
from hpcnn.data.shards import held_out, shards
from hpcnn.errors import ConfigError
from hpcnn.geometry import Block


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Where this rank is among the groups."""

    world: World
    """All ranks."""
    group: World
    """Those of this rank's group."""
    across: World | None
    """Those that have this rank's place in their groups, one of each, in the order of groups; None: one group."""
    count: int
    """Of groups."""
    index: int
    """Of this rank's group."""

    @property
    def worlds(self) -> tuple[World, ...]:
        """All worlds, once each."""
        return (self.world,) if self.across is None else (self.world, self.group, self.across)

    def watch(self, timeout_s: float) -> None:
        """Let one watchdog look after all ranks: in whichever world one waits, it is not the one to blame."""
        self.world.watchdog.timeout_s = timeout_s
        self.world.engine.watch(self.world.watchdog)
        if self.across is not None:
            self.group.report_to(self.world, f"group {self.index}")
            self.across.report_to(self.world, f"place {self.group.rank}")

    @property
    def communication(self) -> Communication:
        """What this rank has sent and waited for in all worlds; its times add up, for only one is waited in at once."""
        total = Communication()
        for world in self.worlds:
            total = total + world.communication
        return total


def count_groups(config: Config, ranks: int) -> int:
    """Return into how many groups so many ranks are divided.

    Raises
    ------
    ConfigError
        If ranks, batch or shards cannot be divided like that.
    """
    average, batch = config.average, config.train.global_batch
    if average.rule == "none":
        return 1
    count = average.groups or ranks
    if ranks % count:
        raise ConfigError(
            f"config: 'average.groups' (={count}) must divide the number of ranks (={ranks})."
            " Start another number of ranks, or set average.groups = 0: every rank is a group."
        )
    if batch % count:
        raise ConfigError(
            f"config: 'train.global_batch' (={batch}) must be a multiple of the number of groups (={count}), among"
            " which it is divided. Change it or average.groups."
        )
    if average.shards and len(average.shards) != count:
        raise ConfigError(
            f"config: 'average.shards' (={list(average.shards)}) must have one fraction for each of the {count} groups."
        )
    return count


def config_of_group(config: Config, count: int) -> Config:
    """Return what one of so many groups runs: the same with its part of the batch, by which rates and losses are."""
    if config.average.rule == "none":
        return config
    recipe = dataclasses.replace(config.train, global_batch=config.train.global_batch // count)
    return dataclasses.replace(config, train=recipe, average=AverageConfig())


def make_groups(config: Config, world: World) -> Groups:
    """Divide the ranks into groups as configured (collective); errors are those of `count_groups`, on every rank."""
    count = count_groups(config, world.size)
    if count == 1:
        return Groups(world=world, group=world, across=None, count=1, index=0)
    members = world.size // count
    index, place = divmod(world.rank, members)
    return Groups(world=world, group=world.split(index), across=world.split(place), count=count, index=index)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """From which images the loader of a group draws, and how."""

    rows: np.ndarray | None
    """int64 (n,): the images; None: all of the training set."""
    share: Block | None
    """Positions in every batch drawn that are the group's; None: all of them."""
    batch: int
    """Images of a draw."""
    num_samples: int
    """Images that the group may get."""
    steps_per_epoch: int
    """The same for all groups."""
    validation: np.ndarray | None
    """int64 (m,): images that are held out of all training; None: none are."""


def make_draw(config: Config, groups: Groups, num_samples: int) -> Draw:
    """Return how this rank's group draws from `num_samples` training images.

    Raises
    ------
    ConfigError, DataError
        On every rank, if there are too few images for that.
    """
    average, seed = config.average, config.train.seed
    batch = config.train.global_batch
    if average.rule == "none":
        per_epoch = steps_per_epoch(num_samples, batch)
        return Draw(
            rows=None, share=None, batch=batch, num_samples=num_samples, steps_per_epoch=per_epoch, validation=None
        )
    rows, validation = None, None
    if average.validation_samples:
        rows, validation = held_out(num_samples, average.validation_samples, seed)
        num_samples = len(rows)
    per_epoch = steps_per_epoch(num_samples, batch)
    own = batch // groups.count
    share: Block | None = Block(groups.index * own, (groups.index + 1) * own)
    if average.shards:
        parts = shards(np.arange(num_samples) if rows is None else rows, average.shards, seed)
        for index, part in enumerate(parts):
            if len(part) < own:
                raise ConfigError(
                    f"config: shard {index} of 'average.shards' has {len(part)} images, fewer than a group's batch"
                    f" (={own}). Enlarge the shard or lower train.global_batch."
                )
        rows, share, batch, num_samples = parts[groups.index], None, own, len(parts[groups.index])
    return Draw(
        rows=rows,
        share=share,
        batch=batch,
        num_samples=num_samples,
        steps_per_epoch=per_epoch,
        validation=validation,
    )
