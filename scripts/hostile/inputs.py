"""Kinds of hostile inputs: each writes one into an empty folder and says what to run on it."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from hpcnn import configuration
from hpcnn.data import hdf5, open_data
from hpcnn.nn import models
from hpcnn.plan import machine, planner
from scripts.hostile import mutate
from tests.run_folder import write_run

SMALL = [
    "--set", "data.source=synthetic", "--set", "data.image_shape=[28, 28, 1]", "--set", "data.num_samples=16",
    "--set", "data.num_classes=10", "--set", "data.test=''", "--set", "train.global_batch=8",
]  # fmt: skip
SHORT = ["--set", "train.steps=1", "--set", "train.epochs=1"]


class Case(NamedTuple):
    """What to run, in the folder of the case, and what must not be there after it has failed."""

    arguments: list[str]
    outputs: tuple[str, ...] = ()


class Sources:
    """Valid files, made once in a folder and copied from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        overrides = [word for word in (*SMALL, *SHORT) if word != "--set"]
        config = configuration.load("lenet5", [*overrides, "plan.preset=hybrid"])
        self.config = configuration.to_toml(config)
        model = models.configured(config.model, (28, 28, 1), 10)
        self.plans = [planner.to_toml(planner.make_plan(model, name, 2, 8)) for name in ("hybrid", "data", "spatial")]
        grouped = planner.make_plan(model, "tiled-groups", 2, 8)
        self.plans.append(planner.to_toml(grouped).replace("fused = true\n", "fused = true\nturns = [2, 1]\n", 1))
        link = machine.Link(
            alpha_s=1e-5, beta_s_per_byte=1e-9, sizes=(8, 1024), copy_s=(1e-5, 2e-5), sum_s=(1e-5, 3e-5)
        )
        where = machine.Measured(hosts=2, ranks=4, cores=2, mpi="MPICH")
        self.machine = machine.to_toml(machine.Machine(node=link, network=link, measured=where))
        write_run(folder / "run")
        self._images(folder / "images.h5")
        for name, old in (("old.h5", True), ("new.h5", False)):
            mutate.rewritten(folder / "images.h5", folder / name, old=old)

    def _images(self, path: Path) -> None:
        random = np.random.default_rng(0)
        labels = np.arange(16) % 10
        offset = hdf5.create(path, 16, (28, 28, 1), tuple("abcdefghij"), labels, source="made", licence="none")
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(random.integers(0, 256, (16, 28, 28, 1), np.uint8).tobytes())
        hdf5.finish(path, np.array([0.5]), np.array([0.25]))

    def checkpoint(self) -> Path:
        """Return a model file of the configuration, written as training does."""
        path = self.folder / "final.h5"
        if not path.exists():
            from hpcnn.nn.parameter import ParameterSet
            from hpcnn.train import checkpoint, model_file

            config = configuration.from_toml(self.config, "the source")
            parameters = ParameterSet.of(models.configured(config.model, (28, 28, 1), 10).layers)
            tensors = checkpoint.tensors_of(parameters)
            with open_data(config.data, "train") as data:
                saved = model_file.Checkpoint(
                    model="lenet5",
                    parameters=tensors,
                    optimizer={"velocity": tensors},
                    config=self.config,
                    data_fingerprint=data.fingerprint(),
                )
            model_file.write(path, saved)
        return path


def _changed(draw: Random, text: str) -> bytes:
    return mutate.extremes(draw, text) if draw.random() < 0.3 else mutate.mutate_toml(draw, text)


def _config(draw: Random, sources: Sources, folder: Path) -> Case:
    path = folder / "config.toml"
    path.write_bytes(_changed(draw, sources.config))
    if draw.random() < 0.03:
        mutate.hostile_place(draw, path)
    if draw.random() < 0.3:
        return Case(["train", "config.toml", "--out", "out", *SMALL, *SHORT], ("out/final.h5",))
    return Case(["plan", "config.toml", "--ranks", "2"])


def _plan(draw: Random, sources: Sources, folder: Path) -> Case:
    (folder / "config.toml").write_text(sources.config)
    (folder / "plan.toml").write_bytes(_changed(draw, draw.choice(sources.plans)))
    if draw.random() < 0.03:
        mutate.hostile_place(draw, folder / "plan.toml")
    if draw.random() < 0.3:
        return Case(["train", "config.toml", "--plan", "plan.toml", "--out", "out"], ("out/final.h5",))
    return Case(["plan", "config.toml", "--plan", "plan.toml", "--ranks", "2"])


def _machine(draw: Random, sources: Sources, folder: Path) -> Case:
    (folder / "machine.toml").write_bytes(_changed(draw, sources.machine))
    if draw.random() < 0.03:
        mutate.hostile_place(draw, folder / "machine.toml")
    preset = draw.choice(("data", "hybrid", "auto"))
    settings = ["--set", "exchange.kind=auto", "--set", f"plan.preset={preset}"]
    return Case(["plan", "lenet5", "--ranks", "4", "--machine", "machine.toml", *settings])


def _hdf5(draw: Random, sources: Sources, folder: Path) -> Case:
    path = folder / "images.h5"
    shutil.copy(sources.folder / "images.h5", folder / "other.h5")
    shutil.copy(sources.folder / draw.choice(("images.h5", "old.h5", "new.h5")), path)
    _mutate_hdf5(draw, path)
    if draw.random() < 0.2:
        source = ["--set", "data.source=images.h5"]
        return Case(["train", "lenet5", *source, "--set", "train.global_batch=8", "--out", "out", *SHORT])
    return Case(["data", "info", "images.h5"])


def _checkpoint(draw: Random, sources: Sources, folder: Path) -> Case:
    path = folder / "final.h5"
    if draw.random() < 0.5:
        shutil.copy(sources.checkpoint(), path)
    else:
        mutate.rewritten(sources.checkpoint(), path, old=draw.random() < 0.7)
    shutil.copy(path, folder / "other.h5")
    _mutate_hdf5(draw, path)
    if draw.random() < 0.3:
        (folder / "run" / "checkpoints").mkdir(parents=True)
        shutil.move(path, folder / "run" / "checkpoints" / "step-00000001.h5")
        (folder / "run" / "config.toml").write_text(sources.config)
        (folder / "run" / "metrics.jsonl").write_bytes(mutate.json_bytes(draw, {"event": "step", "step": 1}) + b"\n{}")
        return Case(["train", "--resume", "--out", "run", "--set", "train.steps=2"], ("run/final.h5",))
    return Case(["evaluate", "final.h5", *SMALL])


def _mutate_hdf5(draw: Random, path: Path) -> None:
    if draw.random() < 0.4:
        path.write_bytes(mutate.mutate_bytes(draw, path.read_bytes()))
    elif draw.random() < 0.97:
        mutate.mutate_hdf5(draw, path)
    else:
        mutate.hostile_place(draw, path)


def _report(draw: Random, sources: Sources, folder: Path) -> Case:
    run = folder / "run"
    shutil.copytree(sources.folder / "run", run)
    for _ in range(draw.choice((1, 1, 2))):
        match draw.choice(("metrics", "trace", "environment", "config", "plan", "scaling", "place")):
            case "metrics":
                lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
                at = draw.randrange(len(lines) - 1)
                lines[at] = mutate.json_bytes(draw, {"event": "step", "step": 1, "step_s": 0.1, "loss": 1.0})
                (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
            case "trace" | "environment" as name if (run / f"{name}.json").is_file():
                known = json.loads(sources.folder.joinpath("run", f"{name}.json").read_text())
                (run / f"{name}.json").write_bytes(mutate.json_bytes(draw, known))
            case "config" | "plan" as name:
                known = sources.folder.joinpath("run", f"{name}.toml").read_text()
                (run / f"{name}.toml").write_bytes(mutate.mutate_toml(draw, known))
            case "scaling":
                table = "mode,model,plan,exchange,algorithm,ranks,step_s,global_batch,status\n" + "".join(
                    f"strong,lenet5,data,allreduce,ring,{ranks},{0.1 / ranks},64,finished\n" for ranks in (1, 2, 4)
                )
                (run / "scaling.csv").write_bytes(mutate.mutate_csv(draw, table))
            case _:
                names = ("metrics.jsonl", "trace.json", "environment.json", "config.toml", "plan.toml", "scaling.csv")
                if (path := run / draw.choice(names)).is_file():
                    mutate.hostile_place(draw, path)
    return Case(["report", "run", "--out", "report.html"], ("report.html",))


def _idx(draw: Random, sources: Sources, folder: Path) -> Case:
    source, random = folder / "idx", np.random.default_rng(0)
    source.mkdir()
    arrays = (("images-idx3", random.integers(0, 256, (12, 4, 3), np.uint8)), ("labels-idx1", np.arange(12) % 3))
    hostile = draw.randrange(2)
    for index, (kind, array) in enumerate(arrays):
        data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        data += array.astype(np.uint8).tobytes()
        path = source / f"train-{kind}-ubyte.gz"
        zipped = draw.random() < 0.5
        if index == hostile and draw.random() < 0.7:
            data = mutate.mutate_bytes(draw, data)
        packed = gzip.compress(data + (bytes(300 << 20) if draw.random() < 0.01 else b"")) if zipped else data
        path.write_bytes(mutate.mutate_bytes(draw, packed) if index == hostile and draw.random() < 0.3 else packed)
        if index == hostile and draw.random() < 0.05:
            mutate.hostile_place(draw, path)
    return Case(["data", "import", "idx", "--out", "out"], ("out/train.h5", "out/test.h5"))


def _cifar(draw: Random, sources: Sources, folder: Path) -> Case:
    random = np.random.default_rng(1)
    names = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
    members = {name: random.integers(0, 10, 2 * 3073, np.uint8).tobytes() for name in names}
    members["batches.meta.txt"] = b"\n".join(b"kind%d" % number for number in range(10))
    (folder / "cifar.tar.gz").write_bytes(mutate.hostile_tar(draw, members))
    return Case(["data", "import", "cifar.tar.gz", "--out", "out"], ("out/train.h5", "out/test.h5"))


def _folder(draw: Random, sources: Sources, folder: Path) -> Case:
    from PIL import Image

    paths = [
        folder / "tree" / kind / f"{index}.{suffix}" for kind in "ab" for index, suffix in ((0, "png"), (1, "jpg"))
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), draw.randrange(1 << 24)).save(path)
    path = draw.choice(paths)
    match draw.randrange(8):
        case 0:
            mutate.hostile_place(draw, path)
        case 1:
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n")
        case 2:
            header = (
                b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
                + struct.pack(">II", 1 << draw.randrange(31), 1 << 20)
                + b"\x08\2\0\0\0"
            )
            path.write_bytes(header + bytes(40))
        case 3:
            names = (b"\xff\xfe", b"\x1b[2J", b"x\ny", b"a" * 250, b"-rf")
            bytes(path.parent)
            path.parent.rename(Path(str(folder / "tree")) / draw.choice(names).decode("utf-8", "surrogateescape"))
        case 4:
            (folder / "tree" / "classes.tsv").write_bytes(draw.choice((b"a\t\xff", b"a\t\x1b[2J\nb\t" + b"x" * 70_000)))
        case _:
            path.write_bytes(mutate.mutate_bytes(draw, path.read_bytes()))
    scaled = draw.choice(([], ["--size", "4"], ["--skip-broken"]))
    return Case(["data", "import", "tree", "--out", "out", *scaled], ("out/train.h5", "out/test.h5"))


KINDS: dict[str, Callable[[Random, Sources, Path], Case]] = {
    "config": _config,
    "plan": _plan,
    "machine": _machine,
    "hdf5": _hdf5,
    "checkpoint": _checkpoint,
    "report": _report,
    "idx": _idx,
    "cifar": _cifar,
    "folder": _folder,
}


def make(kind: str, number: int, seed: int, sources: Sources, folder: Path) -> Case:
    """Write case `number` of a kind into a new folder and return what to run there; the same for the same seed."""
    folder.mkdir(parents=True)
    return KINDS[kind](Random(f"{seed} {kind} {number}"), sources, folder)
