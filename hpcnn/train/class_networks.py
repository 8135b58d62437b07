"""A network for each class, trained apart from all others, and the test that asks them all.

The ranks form groups; network i belongs to group i mod G and is trained there like any other run, in the folder
class-00i. Groups send each other nothing until the test: then two numbers a network and image are gathered.
"""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from hpcnn import arrays, configuration
from hpcnn.arrays import Array
from hpcnn.comm.collectives import allgather, allreduce
from hpcnn.comm.world import World
from hpcnn.config import Config
from hpcnn.data import DataSet, open_data
from hpcnn.data.one_class import OneClass, hold_out
from hpcnn.data.sources import check_alike, has_test_images
from hpcnn.errors import CheckpointError, ConfigError
from hpcnn.geometry import split
from hpcnn.nn import subspace
from hpcnn.nn.separation import BASIS, THRESHOLD, directions_of
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train.evaluate import collect, restore
from hpcnn.train.setup import Parts, assemble
from hpcnn.train.signals import StopRequest
from hpcnn.train.trainer import Trainer

OTHERS = "a signal to another rank"


@dataclass(frozen=True)
class ClassScore:
    """What the networks of all classes say of a test set together."""

    accuracy: float
    """By rejections and thresholds."""
    rejection_accuracy: float
    """By the smallest rejection, without thresholds."""
    head_accuracy: float
    """By the largest of the binary classifiers' log odds."""
    unknown: float
    """Share of images that no network takes."""
    own_rejection: float
    """Mean rejection of images by the network of their class."""
    other_rejection: float
    """Mean rejection of images by the other networks."""
    thresholds: list[float]
    num_samples: int

    def describe(self) -> str:
        """Return a line for people."""
        return (
            f"test accuracy {self.accuracy:.4f} by thresholds, {self.rejection_accuracy:.4f} by the smallest rejection,"
            f" {self.head_accuracy:.4f} by the classifiers; {self.unknown:.1%} of {self.num_samples} images are taken"
            f" by no class; mean rejection {self.own_rejection:.3f} of own, {self.other_rejection:.3f} of other images"
        )


def open_test(config: Config, world: World) -> DataSet | None:
    """Return the configuration's test images, None where there are none (collective)."""
    data = None
    with world.agreeing():
        if has_test_images(config.data):
            data = open_data(config.data, "test")
    return data


def _any(world: World, flag: bool) -> bool:
    """Return whether the flag is set on any rank (collective)."""
    total = np.array([float(flag)])
    allreduce(world.comm, total)
    return bool(total[0])


class ClassNetworks:
    """The networks of all classes of a data set, shared out over groups of ranks (collective).

    Parameters
    ----------
    config : Config
        Of method "rejection".
    world : World
        All ranks.
    folder : Path
        The run's.

    Raises
    ------
    HpcnnError
        The same on every rank: images that cannot be read, more groups than ranks or classes.
    """

    def __init__(self, config: Config, world: World, folder: Path) -> None:
        self.config, self.world, self.folder = config, world, folder
        with world.agreeing():
            self._data = open_data(config.data, "train")
        # Groups compare nothing with each other later.
        world.compare(
            {"configuration": configuration.to_toml(config), "training images": self._data.fingerprint()},
        )
        classes = self._data.num_classes
        groups = config.separation.groups or min(classes, world.size)
        if groups > min(classes, world.size):
            raise ConfigError(
                f"config: 'separation.groups' (={groups}) must be at most the number of ranks (={world.size}) and of"
                f" classes (={classes}). Lower it, or set 0 for as many as there can be."
            )
        self._members = [split(world.size, groups, index) for index in range(groups)]
        self._index = next(i for i, (start, stop) in enumerate(self._members) if start <= world.rank < stop)
        self._group = world.split(self._index)
        self._shares = [range(index, classes, groups) for index in range(groups)]
        labels = self._data.labels_of(np.arange(len(self._data)))
        self._kept, self._held = hold_out(labels, config.separation.held_out, config.train.seed)

    @property
    def classes(self) -> range:
        """The classes whose networks this rank's group has."""
        return self._shares[self._index]

    def close(self) -> None:
        """Close the images."""
        self._data.close()

    def train(self, *, resume: bool, progress_stream: TextIO, result_stream: TextIO) -> str:
        """Train all networks, as far as they are not, and return why they stopped early, if so (collective).

        Only the first group shows its progress. An error in one group is raised on all ranks when the others are done.
        """
        with self.world.agreeing():
            if self.world.rank == 0:
                self._open_folder(resume)
        stopped = ""
        with self.world.agreeing(), StopRequest() as request:
            for index in self.classes:
                shown = self._index == 0 and self._group.rank == 0
                if shown:
                    result_stream.write(f"network of class {index} ({self._data.class_names[index]})\n")
                streams = (progress_stream, result_stream) if shown else (io.StringIO(), io.StringIO())
                stopped = self._train_one(index, resume, *streams)
                if _any(self._group, bool(stopped) or request.requested):  # between two networks too
                    stopped = stopped or request.reason or OTHERS
                    break
        anywhere = _any(self.world, bool(stopped))
        return stopped or (OTHERS if anywhere else "")

    def _train_one(self, index: int, resume: bool, progress_stream: TextIO, result_stream: TextIO) -> str:
        with self._group.agreeing():
            train_data = OneClass(self._data, self._kept, index)
            held_data = OneClass(self._data, self._held, index, balanced=False)
        team = self._group.split(0)  # what a run prepares goes with its world
        parts = self._assemble(index, train_data, team)
        trainer = Trainer(parts, self._folder(index), progress_stream=progress_stream, result_stream=result_stream)
        trainer.prepare(resume=resume)
        outcome = trainer.train()
        if outcome.stopped:
            return outcome.stopped
        self._find_threshold(trainer, held_data)
        team.free()
        return ""

    def _find_threshold(self, trainer: Trainer, held_data: OneClass) -> None:
        """Find the threshold of a network by images that were held out, and save it (collective in the group)."""
        parts = trainer.parts
        rejected = self._columns(parts, held_data)[:, 0]
        own = held_data.labels_of(np.arange(len(held_data))) == 1
        threshold = np.array([subspace.fit_threshold(rejected, own)])
        parts.world.broadcast(threshold)
        if threshold[0] != parts.model.statistics[THRESHOLD][0]:
            parts.model.statistics[THRESHOLD][...] = threshold
            trainer.save(final=True)

    def test(self, data: DataSet) -> ClassScore:
        """Return what the trained networks say of test images, equal on all ranks (collective).

        Raises
        ------
        CheckpointError
            On every rank, if a network is missing or damaged.
        """
        check_alike(self._data, data)
        count = len(data)
        mine = np.zeros((len(self.classes), 2 * count + 1))
        with self.world.agreeing():
            for row, index in zip(mine, self.classes, strict=True):
                with self._group.agreeing():
                    loaded = self._load(index) if self._group.rank == 0 else None
                team = self._group.split(0)
                parts = self._assemble(index, OneClass(self._data, self._kept, index), team)
                restore(parts, loaded)
                columns = self._columns(parts, data)
                row[:count], row[count:-1] = columns[:, 0], columns[:, 1]
                row[-1] = parts.model.statistics[THRESHOLD][0]
                team.free()
        counts = np.zeros(self.world.size, np.int64)  # the first rank of each group speaks for it
        for (start, _), share in zip(self._members, self._shares, strict=True):
            counts[start] = len(share)
        block = mine if self._group.rank == 0 else mine[:0]
        rows = allgather(self.world.comm, block, counts=counts.tolist())
        everyone = np.empty_like(rows)
        everyone[[index for share in self._shares for index in share]] = rows
        return self._score(
            everyone[:, :count].T, everyone[:, count:-1].T, everyone[:, -1], data.labels_of(np.arange(count))
        )

    def _score(self, rejected: np.ndarray, odds: np.ndarray, thresholds: np.ndarray, labels: np.ndarray) -> ClassScore:
        classes, decide = len(thresholds), subspace.decide
        found = decide(rejected, thresholds, unknown=self.config.separation.unknown)
        own = labels[:, None] == np.arange(classes)
        return ClassScore(
            accuracy=float(np.mean(found == labels)),
            rejection_accuracy=float(np.mean(np.argmin(rejected, axis=1) == labels)),
            head_accuracy=float(np.mean(np.argmax(odds, axis=1) == labels)),
            unknown=float(np.mean(decide(rejected, thresholds, unknown=True) < 0)),
            own_rejection=float(rejected[own].mean()),
            other_rejection=float(rejected[~own].mean()) if classes > 1 else 0.0,
            thresholds=thresholds.tolist(),
            num_samples=len(labels),
        )

    def _columns(self, parts: Parts, data: DataSet) -> np.ndarray:
        """Return each image's rejection and log odds by one network, (images, 2) (collective in the group)."""
        basis = parts.model.statistics[BASIS]

        def both(logits: Array, features: Array) -> np.ndarray:
            rejected = subspace.rejections(directions_of(features)[0], [basis])
            two = arrays.to_host(logits).astype(np.float64)
            return np.column_stack([rejected[:, 0], two[:, 1] - two[:, 0]])

        return collect(parts.program, data, self.config.train.global_batch, 2, both)

    def _assemble(self, index: int, train_data: DataSet, team: World) -> Parts:
        """Return the parts of one network; each starts from weights of its own (collective in the group)."""
        train = dataclasses.replace(self.config.train, seed=self.config.train.seed + index)
        return assemble(dataclasses.replace(self.config, train=train), team, train_data=train_data)

    def _folder(self, index: int) -> Path:
        return self.folder / f"class-{index:03d}"

    def _load(self, index: int) -> checkpoints.Checkpoint:
        path = self._folder(index) / checkpoints.FINAL
        if not path.is_file():
            raise CheckpointError(
                f"evaluate: '{path}' is missing; a run of separation.method = \"rejection\" needs the networks of all"
                " classes. Train the rest with --resume."
            )
        return checkpoints.load(path)

    def _open_folder(self, resume: bool) -> None:
        if any(self.folder.glob("class-*")) and not resume:
            raise ConfigError(
                f"train: '{self.folder}' holds a run already; runs are not overwritten."
                " Add --resume to go on with it, or choose another --out."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.toml").write_text(configuration.to_toml(self.config))
        except OSError as error:
            raise ConfigError(f"train: cannot write the run folder '{self.folder}': {error}.") from None
