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
from hpcnn.comm.world import World
from hpcnn.config import Config
from hpcnn.data import DataSet, open_data
from hpcnn.data.loader import Part
from hpcnn.data.sampler import steps_per_epoch
from hpcnn.data.sources import check_alike, has_test_images
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.ops.backend import set_compute
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.plan import planner
from hpcnn.plan.buckets import Bucket
from hpcnn.plan.exchanges import choose_buckets, lazy_rounds
from hpcnn.plan.machine import DEFAULT
from hpcnn.plan.machine import load as load_machine
from hpcnn.plan.planner import Plan
from hpcnn.plan.search import plan_for
from hpcnn.plan.site import Site
from hpcnn.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a configuration describes, built on this rank."""

    config: Config
    world: World
    train_data: DataSet
    test_data: DataSet | None
    program: Program
    steps_per_epoch: int
    total_steps: int

    @property
    def model(self) -> Model:
        """The model that the program runs."""
        return self.program.model

    def close(self) -> None:
        """Close the data sets."""
        for data in (self.train_data, self.test_data):
            if data is not None:
                data.close()


def assemble(config: Config, world: World, plan_text: str | None = None) -> Parts:
    """Build everything a configuration describes (collective).

    Parameters
    ----------
    plan_text : str, optional
        A saved plan to obey instead of the configuration's preset.

    Raises
    ------
    HpcnnError
        The same on every rank: a data set that cannot be opened, a model that does not fit the images, a plan that
        cannot be run.
    """
    world.compare({"version": __version__, "code": code_digest()}, source="the installation", rule="run the same hpcnn")
    open_device(config, world)
    with world.agreeing():  # one node may not see a file, or read it as damaged
        train_data = open_data(config.data, "train")
        test_data = open_data(config.data, "test") if has_test_images(config.data) else None
        if test_data is not None:
            check_alike(train_data, test_data)
    spec = models.configured(config.model, train_data.image_shape, train_data.num_classes)
    machine = DEFAULT
    if config.exchange.machine:
        with world.agreeing():
            machine = load_machine(config.exchange.machine)
    world.engine.machine = machine
    world.engine.segment_bytes = machine.segment_bytes(single_node=len(set(world.engine.nodes)) == 1)
    plan = _plan(config, spec, world, plan_text)
    world.watchdog.timeout_s = config.exchange.timeout_seconds
    world.engine.watch(world.watchdog)
    buckets = choose_buckets(
        spec,
        config.exchange.kind,
        bucket_bytes=config.exchange.bucket_bytes,
        ranks=world.size,
        global_batch=config.train.global_batch,
        machine=machine,
        nodes=world.engine.nodes,
        plan=plan,
        rank=world.rank,
        wire_bytes=Site.of(config, machine, world.engine.nodes).wire_bytes,
        every=lazy_rounds(spec, config.exchange.lazy_layers, config.exchange.lazy_steps),
    )
    _check_agreement(world, config, spec, plan, buckets)
    sets = {"training set": train_data, "test set": test_data}
    fingerprints = {name: data.fingerprint() for name, data in sets.items() if data is not None}
    world.compare(fingerprints, source="what data.source names", rule="see the same images")
    per_epoch = steps_per_epoch(len(train_data), config.train.global_batch)
    dtype = np.float64 if config.train.compute == "fp64" else np.float32
    activation = bfloat16() if config.train.compute == "bf16" else dtype
    with world.agreeing(), device_errors(config):  # one GPU may have less room than others
        parts = plan.parts(spec, world.rank)
        model = Model(spec, config.train.seed, dtype, parts, activation=activation, place=config.device)
    program = Program(
        model,
        plan,
        world,
        make_exchange(config.exchange, spec, plan, buckets, model.parameters, world),
        label_smoothing=config.train.label_smoothing,
        sync_batchnorm=config.model.sync_batchnorm,
        algorithm="auto" if config.exchange.algorithm == "nccl" else config.exchange.algorithm,
    )
    return Parts(
        config=config,
        world=world,
        train_data=train_data,
        test_data=test_data,
        program=program,
        steps_per_epoch=per_epoch,
        total_steps=config.train.steps or config.train.epochs * per_epoch,
    )


@functools.cache
def code_digest() -> str:
    """Return a hash of hpcnn's source, equal wherever the same files are installed."""
    digest, folder = hashlib.sha256(), Path(hpcnn.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


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


def _plan(config: Config, spec: ModelSpec, world: World, plan_text: str | None) -> Plan:
    """Return the plan to obey; what has to be searched for is found by rank 0 (collective)."""
    site = Site.of(config, world.engine.machine, world.engine.nodes)
    if plan_text is None and config.plan.preset == "auto":
        with world.agreeing():
            mine = planner.to_toml(plan_for(config, spec, site)) if world.rank == 0 else ""
        plan_text = world.broadcast_obj(mine)
    if plan_text is not None:
        return planner.from_toml(plan_text, spec, config.train.global_batch)
    return plan_for(config, spec, site)


def batch_part(program: Program, num_samples: int) -> Part:
    """Return what this rank reads of a batch of so many samples."""
    route = program.route(num_samples)
    samples, rows, columns, _ = route.images
    return Part(samples, rows, columns, route.labels)


def _check_agreement(world: World, config: Config, model: ModelSpec, plan: Plan, buckets: tuple[Bucket, ...]) -> None:
    """Raise on all ranks if some have read another configuration than others, as from a stale copy (collective)."""
    parts = {
        "configuration": configuration.to_toml(config),
        "model": repr(model),
        "plan": planner.to_toml(plan),
        "bucket layout": repr([(bucket.layers, bucket.kind, bucket.cut) for bucket in buckets]),
        "machine": repr(world.engine.machine),
    }
    world.compare({name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()})
