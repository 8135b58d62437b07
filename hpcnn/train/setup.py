"""From a configuration to the parts of a run: data, model, plan, program."""

from __future__ import annotations

import functools
import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import hpcnn
from hpcnn import __version__, configuration, gpu
from hpcnn.arrays import bfloat16
from hpcnn.comm.collectives import allreduce
from hpcnn.comm.world import World
from hpcnn.config import Config, TrainConfig
from hpcnn.data import DataSet, open_data
from hpcnn.data.dataset import Subset
from hpcnn.data.loader import Part
from hpcnn.data.sources import check_alike, has_test_images
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.nn.separation import FeatureLoss, RejectionMargin, SubspaceSeparation
from hpcnn.ops.backend import set_compute
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.parallel.reproducible import ReproducibleProgram
from hpcnn.plan import planner
from hpcnn.plan.buckets import Bucket
from hpcnn.plan.exchanges import buckets_of
from hpcnn.plan.machine import DEFAULT, Machine
from hpcnn.plan.machine import load as load_machine
from hpcnn.plan.planner import Plan
from hpcnn.plan.search import plan_for
from hpcnn.plan.site import Site
from hpcnn.spec import ModelSpec
from hpcnn.train import reproducible
from hpcnn.train.groups import Draw, Groups, config_of_group, make_draw, make_groups


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a configuration describes, built on this rank."""

    config: Config
    groups: Groups
    recipe: TrainConfig
    """Of this rank's group: the configuration's, with the group's part of the batch."""
    draw: Draw
    train_data: DataSet
    test_data: DataSet | None
    """What of the test set this rank's group evaluates."""
    validation_data: DataSet | None
    """Held-out training images, all of them."""
    program: Program
    total_steps: int
    arithmetic: str = ""
    """What a reproducible run computes with; empty: it is not reproducible."""

    @property
    def world(self) -> World:
        """All ranks; those of the group are the program's world."""
        return self.groups.world

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which all groups together go through as many images as there are."""
        return self.draw.steps_per_epoch

    @property
    def model(self) -> Model:
        """The model that the program runs."""
        return self.program.model

    def close(self) -> None:
        """Close the data sets."""
        for data in (self.train_data, self.test_data, self.validation_data):
            if data is not None:
                data.close()


def assemble(config: Config, world: World, plan_text: str | None = None, *, train_data: DataSet | None = None) -> Parts:
    """Build everything a configuration describes (collective).

    Parameters
    ----------
    plan_text : str, optional
        A saved plan to obey instead of the configuration's preset.
    train_data : DataSet, optional
        Training images instead of the configuration's, and no test images.

    Raises
    ------
    HpcnnError
        The same on every rank: a data set that cannot be opened, a model that does not fit the images, a plan that
        cannot be run.
    """
    world.compare({"version": __version__, "code": code_digest()}, source="the installation", rule="run the same hpcnn")
    world.compare({"configuration": configuration.to_toml(config)})  # ranks are divided by it
    open_device(config, world)
    arithmetic = reproducible.prepare(config, world)
    groups = make_groups(config, world)
    mine, group = config_of_group(config, groups.count), groups.group
    draw, train_data, test_data, validation_data = _open(config, groups, train_data)
    spec = models.configured(config.model, train_data.image_shape, train_data.num_classes)
    machine = _prepare_worlds(config, groups)
    plan = _plan(mine, spec, group, plan_text)
    buckets = buckets_of(mine, spec, plan, Site.of(mine, machine, group.engine.nodes), rank=group.rank)
    _check_agreement(world, spec, plan, buckets)
    dtype = np.float64 if config.train.compute == "fp64" else np.float32
    activation = bfloat16() if config.train.compute == "bf16" else dtype
    with world.agreeing(), device_errors(config):  # one GPU may have less room than others
        parts = plan.parts(spec, group.rank)
        model = Model(spec, config.train.seed, dtype, parts, activation=activation, place=config.device)
    program = _program(config, model, plan, buckets, group)
    return Parts(
        config=config,
        groups=groups,
        recipe=mine.train,
        draw=draw,
        train_data=train_data,
        test_data=test_data,
        validation_data=validation_data,
        program=program,
        total_steps=config.train.steps or config.train.epochs * draw.steps_per_epoch,
        arithmetic=arithmetic,
    )


def _program(config: Config, model: Model, plan: Plan, buckets: tuple[Bucket, ...], group: World) -> Program:
    """Return the program of a configuration, with its exchange (collective)."""
    num_shards = config.train.virtual_shards if config.train.reproducible else 0
    smoothing = config.train.label_smoothing
    exchange = make_exchange(config.exchange, model.spec, plan, buckets, model.parameters, group, num_shards=num_shards)
    if num_shards:
        return ReproducibleProgram(model, plan, group, exchange, num_shards=num_shards, label_smoothing=smoothing)
    return Program(
        model,
        plan,
        group,
        exchange,
        label_smoothing=smoothing,
        feature_loss=_feature_loss(config, model, group),
        sync_batchnorm=config.model.sync_batchnorm,
        algorithm="auto" if config.exchange.algorithm == "nccl" else config.exchange.algorithm,
    )


@functools.cache
def code_digest() -> str:
    """Return a hash of hpcnn's source, equal wherever the same files are installed."""
    digest, folder = hashlib.sha256(), Path(hpcnn.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _open(
    config: Config, groups: Groups, given: DataSet | None
) -> tuple[Draw, DataSet, DataSet | None, DataSet | None]:
    """Return how to draw images, and the training, test and held-out images (collective).

    `given` training images are taken instead of the configuration's, and no test images.
    """
    with groups.world.agreeing():  # one node may not see a file, or read it as damaged
        train = open_data(config.data, "train") if given is None else given
        draw = make_draw(config, groups, len(train))
        test = open_data(config.data, "test") if given is None and has_test_images(config.data) else None
        if test is not None:
            check_alike(train, test)
        prints = {"training set": train.fingerprint(), "test set": test.fingerprint() if test is not None else ""}
        if test is not None and len(test) >= groups.count > 1:
            test = Subset(test, np.arange(groups.index, len(test), groups.count))
        held_out = None
        if draw.validation is not None:  # opened once more: the loader's thread reads the first one
            held_out = Subset(open_data(config.data, "train"), draw.validation)
    groups.world.compare(prints, source="what data.source names", rule="see the same images")
    return draw, train, test, held_out


def _prepare_worlds(config: Config, groups: Groups) -> Machine:
    """Tell all worlds what links cost, and how long to wait for ranks; return the machine (collective)."""
    machine = DEFAULT
    if config.exchange.machine:
        with groups.world.agreeing():
            machine = load_machine(config.exchange.machine)
    for world in groups.worlds:
        world.engine.machine = machine
        world.engine.segment_bytes = machine.segment_bytes(single_node=len(set(world.engine.nodes)) == 1)
    groups.watch(config.exchange.timeout_seconds)
    return machine


def open_device(config: Config, world: World) -> None:
    """Take this rank's GPU, if the configuration wants one (collective).

    Raises
    ------
    DeviceError
        On every rank, if any has none, or one that cannot be used.
    """
    if config.device == "cpu":
        return
    from hpcnn.ops.cuda.device import device  # imported here: few runs have a GPU
    from hpcnn.ops.cuda.gpu import load

    with world.agreeing():
        load()
        gpu.choose(world.local_rank)
        device()
    set_compute("tf32" if config.train.compute == "tf32" else "fp32")


def device_errors(config: Config) -> AbstractContextManager[None]:
    """Return a context manager that turns what a GPU lacks memory for into DeviceError."""
    return gpu.out_of_memory() if config.device == "cuda" else nullcontext()


def _feature_loss(config: Config, model: Model, world: World) -> FeatureLoss | None:
    """Return the term that the configuration adds to the cross entropy, if any; the model's statistics get its own."""
    if config.separation.method == "none":
        return None
    kind = RejectionMargin if config.separation.method == "rejection" else SubspaceSeparation
    term = kind(model.spec, config.separation, lambda sums: allreduce(world.comm, sums, label="class matrices"))
    model.statistics |= term.statistics  # saved, restored and broadcast with them
    return term


def _plan(config: Config, spec: ModelSpec, world: World, plan_text: str | None) -> Plan:
    """Return the plan to obey; what has to be searched for is found by rank 0 (collective)."""
    site = Site.of(config, world.engine.machine, world.engine.nodes)
    if plan_text is None and config.plan.preset == "auto":
        with world.agreeing():
            mine = planner.to_toml(plan_for(config, spec, site)) if world.rank == 0 else ""
        plan_text = world.broadcast_obj(mine)
    if plan_text is not None:
        return planner.from_toml(plan_text, spec, config.train.global_batch, world.size)
    return plan_for(config, spec, site)


def batch_part(program: Program, num_samples: int) -> Part:
    """Return what this rank reads of a batch of so many samples."""
    route = program.route(num_samples)
    samples, rows, columns, _ = route.images
    return Part(samples, rows, columns, route.labels)


def _check_agreement(world: World, model: ModelSpec, plan: Plan, buckets: tuple[Bucket, ...]) -> None:
    """Raise on all ranks if some have come to other things than others, as from a stale file (collective)."""
    parts = {
        "model": repr(model),
        "plan": planner.to_toml(plan),
        "bucket layout": repr([(bucket.layers, bucket.kind, bucket.cut) for bucket in buckets]),
        "machine": repr(world.engine.machine),
    }
    world.compare(parts)
