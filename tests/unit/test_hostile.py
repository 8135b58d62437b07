"""Files that mean harm, one by one; then some of every kind as `scripts/fuzz.py` makes as many as are wanted."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcnn.data import hdf5
from hpcnn.data.hdf5 import Hdf5DataSet
from hpcnn.data.importers import cifar, folder, idx
from hpcnn.data.importers.collection import BrokenImageError
from hpcnn.errors import CheckpointError, DataError, PlanError
from hpcnn.nn import models
from hpcnn.plan import machine, planner
from hpcnn.report.scale_table import read_scale_table
from hpcnn.report.traced import read_trace
from hpcnn.train import metrics, model_file

ROOT = Path(__file__).resolve().parents[2]


# -- archives and pictures


@pytest.fixture
def unpack_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "LARGEST_ARCHIVE_BYTES", 1 << 20)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE])
@pytest.mark.usefixtures("unpack_little")
def test_an_archive_that_unpacks_without_end_is_given_up(kind: bytes, tmp_path: Path):
    header = tarfile.TarInfo("unwanted")
    header.type, header.size = kind, 1 << 32
    path = tmp_path / "cifar.tar.gz"
    path.write_bytes(gzip.compress(header.tobuf() + bytes(2 << 20)))
    with pytest.raises(DataError, match="unpacks to more than 1048576 bytes"):
        cifar.load(path)


def test_headers_that_call_for_headers_are_an_error(tmp_path: Path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 0
    path = tmp_path / "cifar.tar"
    path.write_bytes(header.tobuf() * 5000)
    with pytest.raises(DataError, match="damaged or truncated"):
        cifar.load(path)


def test_members_that_are_links_or_sparse_are_no_files(tmp_path: Path):
    path = tmp_path / "cifar.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("train.bin", tarfile.SYMTYPE), ("test.bin", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(f"../{name}")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        sparse = tarfile.TarInfo("data_batch_1.bin")
        sparse.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(sparse)
    with pytest.raises(DataError, match="holds none of the files"):
        cifar.load(path)


def test_compressed_images_may_claim_what_fits_into_memory_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(idx, "LARGEST_UNPACKED_BYTES", 1 << 20)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    header = bytes((0, 0, 8, 3)) + np.array([2048, 32, 32], ">u4").tobytes()
    path.write_bytes(gzip.compress(header + bytes(2 << 20)))
    with pytest.raises(DataError, match="claims"):
        idx.read(path, 3)


def test_a_picture_in_another_format_is_not_handed_to_its_program(tmp_path: Path):
    from PIL import Image

    for format in ("EPS", "TIFF", "GIF"):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png", format=format)
        with pytest.raises(BrokenImageError, match="cannot be decoded"):
            folder.decode(str(tmp_path / "a.png"), None)


def test_a_pipe_among_pictures_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BrokenImageError, match="pipe or device"):
        folder.decode(str(tmp_path / "a.png"), None)


def test_a_class_folder_whose_name_is_no_text_is_imported(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    from PIL import Image

    tree = tmp_path / os.fsdecode(b"tree\xff")
    for name in (b"\xfe", b"\x1b[2J"):
        (tree / os.fsdecode(name)).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tree / os.fsdecode(name) / "0.png")
    ended = command(tmp_path, "data", "import", os.fsdecode(b"tree\xff"), "--out", "out")
    assert ended.returncode == 0, ended.stderr
    assert command(tmp_path, "data", "info", "out/train.h5").returncode == 0
    with Hdf5DataSet(tmp_path / "out" / "train.h5") as data:
        assert data.num_classes == 2


# -- HDF5


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images.h5"
    hdf5.create(path, 4, (2, 2, 1), ("a", "b"), np.arange(4) % 2)
    hdf5.finish(path, np.array([0.5]), np.array([0.25]))
    return path


def test_a_chunk_that_claims_more_than_all_images_is_not_unpacked(images: Path):
    with h5py.File(images, "r+") as file:
        del file["images"]
        file.create_dataset("images", (4, 2, 2, 1), "u1", chunks=(1 << 21, 32, 32, 1), maxshape=(None,) * 4)
    with pytest.raises(DataError, match="must be contiguous"):
        Hdf5DataSet(images)


def test_too_many_classes_are_refused(images: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hdf5, "MOST_CLASSES", 1)
    with pytest.raises(DataError, match="names 2 classes; at most 1"):
        Hdf5DataSet(images)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.h5")
    with pytest.raises(DataError, match="pipe or device"):
        Hdf5DataSet(tmp_path / "a.h5")
    with pytest.raises(CheckpointError, match=r"pipe or device|Invalid argument"):
        model_file.load(tmp_path / "a.h5")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "final.h5"
    model_file.write(path, model_file.Checkpoint(model="m", parameters={"a/weight": np.ones(50_000, np.float32)}))
    return path


@pytest.mark.parametrize("link", [h5py.ExternalLink("other.h5", "/parameters"), h5py.SoftLink("/statistics")])
def test_a_group_of_a_checkpoint_is_no_link(saved: Path, link: h5py.ExternalLink):
    saved.with_name("other.h5").write_bytes(saved.read_bytes())
    with h5py.File(saved, "r+") as file:
        del file["parameters"]
        file["parameters"] = link
    with pytest.raises(CheckpointError, match="lacks the group 'parameters'"):
        model_file.load(saved)


def test_tensors_that_lie_in_the_same_bytes_are_counted(saved: Path):
    old, num_bytes = saved.with_name("old.h5"), 200_000
    with h5py.File(saved) as file, h5py.File(old, "w", libver="earliest") as copy:
        for name, value in file.attrs.items():
            copy.attrs[name] = value
        for name in ("parameters", "statistics", "optimizer"):
            file.copy(name, copy)
        tensor = copy["parameters/a/weight"]
        for number in range(3):  # without values yet, and so without a place in the file
            empty = copy.create_dataset(f"parameters/b{number}", tensor.shape, "f4")
            empty.attrs["crc32"] = tensor.attrs["crc32"]
        offset = tensor.id.get_offset()
    nowhere, size = b"\xff" * 8, num_bytes.to_bytes(8, "little")
    data = old.read_bytes()
    assert data.count(nowhere + size) == 3
    old.write_bytes(data.replace(nowhere + size, offset.to_bytes(8, "little") + size))
    with h5py.File(old) as file:
        assert (file["parameters/b1"][...] == 1).all()
    with pytest.raises(CheckpointError, match="claims more numbers than the file holds"):
        model_file.load(old)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("epoch", -5),
        ("lazy_steps", -2),
        ("best_accuracy", np.nan),
        ("step", [1, 2]),
        ("step", h5py.Empty("i8")),
    ],
)
def test_numbers_of_a_checkpoint_make_sense(saved: Path, name: str, value: object):
    with h5py.File(saved, "r+") as file:
        file.attrs[name] = value
    with pytest.raises(CheckpointError, match=name):
        model_file.load(saved)


# -- texts


@pytest.mark.parametrize("ranks", ["1e400", "4_000_000_000", "-3", "0", "inf"])
def test_ranks_of_a_plan_are_looked_at_before_they_are_counted_up(ranks: str):
    model = models.build("lenet5", (28, 28, 1), 10)
    text = planner.to_toml(planner.make_plan(model, "data", 2, 8)).replace("ranks = 2", f"ranks = {ranks}")
    with pytest.raises(PlanError):
        planner.from_toml(text, model, 8)
    with pytest.raises(PlanError):
        planner.from_toml(text, model, 8, 2)


def test_as_many_turns_as_a_number_can_be_are_not_counted_up():
    model = models.build("lenet5", (28, 28, 1), 10)
    plan = planner.make_plan(model, "tiled-groups", 1, 8)
    last = sorted(plan.fused)[0]
    text = planner.to_toml(plan).replace("fused = true", f"fused = true\nturns = [{2**62}, {2**62}]", 1)
    begin = time.monotonic()
    assert planner.from_toml(text, model, 8).turns[0][1] == (2**62, 2**62), last
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("value", ["1e308", "1e-320"])
def test_numbers_of_machines_are_such_as_machines_have(value: str):
    known = machine.Measured(hosts=1, ranks=2, cores=2, mpi="MPI")
    text = machine.to_toml(machine.Machine(node=machine.DEFAULT_NODE, measured=known))
    with pytest.raises(PlanError, match=r"'node.alpha_s' .* must lie between"):
        machine.from_toml(
            text.replace("alpha_s = 8e-06", f"alpha_s = {value}").replace("alpha_s = 8e-6", f"alpha_s = {value}")
        )


def test_lines_of_metrics_that_are_nested_without_end_are_skipped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n' + "[" * 200_000 + '\n{"event": "end", "step": 2}\n')
    assert [record["step"] for record in metrics.read(path)] == [1, 2]
    metrics.truncate(path, 1)
    assert path.read_text() == '{"event": "step", "step": 1}\n'


def test_a_trace_of_too_many_steps_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hpcnn.report.traced.MOST_LOOKS", 99)
    spans = [{"ph": "X", "pid": 1, "cat": "step", "name": f"step {n}", "ts": n, "dur": 1} for n in range(10)]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": spans}))
    with pytest.raises(DataError, match="too many steps"):
        read_trace(tmp_path / "trace.json")


def test_a_table_of_too_many_settings_is_not_drawn(tmp_path: Path):
    lines = [f"m{number},1,0.1" for number in range(60)]
    (tmp_path / "scaling.csv").write_text("\n".join(["model,ranks,step_s", *lines]))
    with pytest.raises(DataError, match="60 settings; at most"):
        read_scale_table(tmp_path)


def test_memory_that_cannot_be_had_is_one_line(tmp_path: Path):
    sizes = ["--set", "data.image_shape=[65536, 65536, 1024]", "--set", "data.source=synthetic"]
    ended = command(tmp_path, "train", "lenet5", *sizes, "--out", "out")
    assert ended.returncode == 1
    assert ended.stderr.startswith("hpcnn: error: memory: there is not enough (")
    assert ended.stderr.count("\n") == 1


def command(where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "hpcnn", *words], cwd=where, env=environment, capture_output=True, text=True, timeout=60
    )


# -- all commands


def test_some_inputs_of_every_kind(tmp_path: Path):
    words = [sys.executable, str(ROOT / "scripts/fuzz.py"), "--cases", "63", "--jobs", "1", "--ranks-every", "30"]
    kinds = ["config", "plan", "machine", "hdf5", "checkpoint", "idx", "cifar", "folder"]  # reports are slow to draw
    ended = subprocess.run(
        [*words, "--kinds", *kinds, "--out", str(tmp_path / "fuzz")], capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" 0 wrong") == len(kinds)
