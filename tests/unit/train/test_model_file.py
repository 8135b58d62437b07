import os
import resource
import signal
import time

import h5py
import numpy as np
import pytest

from hpcnn.errors import CheckpointError
from hpcnn.train import model_file
from hpcnn.train.model_file import Checkpoint, load, write

SHAPES = {"conv1/weight": (4, 3, 3, 2), "conv1/bias": (4,), "block1/conv1/weight": (2, 1, 1, 4), "empty/weight": (0, 5)}
SCALARS = ("model", "config", "step", "epoch", "best_accuracy", "data_fingerprint")


def make(step=7, seed=0):
    generator = np.random.default_rng(seed)
    parameters = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return Checkpoint(
        model="lenet5",
        parameters=parameters,
        statistics={"norm1/running_mean": generator.standard_normal(3).astype(np.float32)},
        optimizer={"velocity": {name: 2 * array for name, array in parameters.items()}},
        config='[train]\nlr = 0.1 # "ä"\n',
        step=step,
        epoch=3,
        best_accuracy=0.625,
        data_fingerprint="0123abcd",
    )


def equal_arrays(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape and np.array_equal(ours[name], theirs[name]) for name in ours
    )


def equal(ours, theirs):
    return (
        all(getattr(ours, name) == getattr(theirs, name) for name in SCALARS)
        and equal_arrays(ours.parameters, theirs.parameters)
        and equal_arrays(ours.statistics, theirs.statistics)
        and ours.optimizer.keys() == theirs.optimizer.keys()
        and all(equal_arrays(ours.optimizer[slot], theirs.optimizer[slot]) for slot in ours.optimizer)
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.h5"


def test_a_checkpoint_comes_back_as_it_was(path):
    write(path, make())
    loaded = load(path)
    assert equal(make(), loaded)
    assert loaded.path == path
    assert model_file.read_step(path) == 7
    assert not equal(make(seed=1), loaded)


def test_a_checkpoint_without_state_comes_back(path):
    write(path, Checkpoint(model="m", parameters={"fc/weight": np.ones((2, 3), np.float32)}))
    loaded = load(path)
    assert (loaded.statistics, loaded.optimizer, loaded.config) == ({}, {}, "")
    assert np.array_equal(loaded.parameters["fc/weight"], np.ones((2, 3)))


def test_arrays_that_are_not_contiguous_are_stored_in_their_logical_order(path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write(path, Checkpoint(model="m", parameters={"fc/weight": array.T}))
    assert np.array_equal(load(path).parameters["fc/weight"], array.T)


def test_only_parameters_are_read_where_only_they_are_wanted(path):
    write(path, make())
    loaded = load(path, parameters_only=True)
    assert equal_arrays(make().parameters, loaded.parameters)
    assert (loaded.statistics, loaded.optimizer) == ({}, {})


def test_the_file_has_the_published_layout(path):
    write(path, make())
    with h5py.File(path, "r") as file:
        assert np.array_equal(file["/parameters/conv1/weight"][()], make().parameters["conv1/weight"])
        assert np.array_equal(file["/optimizer/velocity/conv1/bias"][()], 2 * make().parameters["conv1/bias"])
        assert file["/statistics/norm1/running_mean"].shape == (3,)
        assert file.attrs["format"].decode() == "hpcnn-model"
        assert file.attrs["config"].decode() == make().config
        assert (file.attrs["step"], file.attrs["epoch"], file.attrs["version"]) == (7, 3, 1)


def test_equal_states_make_equal_bytes(path):
    write(path, make())
    first = path.read_bytes()
    time.sleep(1.1)  # the library counts seconds
    write(path, make())
    assert first == path.read_bytes()


def test_no_flipped_byte_goes_unnoticed(path):
    write(path, make())
    good = path.read_bytes()
    refused = 0
    for place in range(0, len(good), 7):
        damaged = bytearray(good)
        damaged[place] ^= 0x21
        path.write_bytes(damaged)
        try:
            assert equal(make(), load(path)), f"byte {place} changed what was read"
        except CheckpointError:
            refused += 1
    # The others lie in gaps between the parts of the file.
    assert refused > 0.7 * len(good) / 7


def test_no_truncated_file_is_accepted(path):
    write(path, make())
    good = path.read_bytes()
    for length in range(0, len(good), 61):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            load(path)


@pytest.mark.parametrize("content", [b"", b"not HDF5", b"\x80\x04\x95.", os.urandom(5000)])
def test_a_file_that_is_not_hdf5_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'.*model.h5' is damaged or not an HDF5 file"):
        load(path)


def test_a_missing_file_and_a_folder_are_refused(path):
    with pytest.raises(CheckpointError, match=r"'.*model.h5' does not exist"):
        load(path)
    with pytest.raises(CheckpointError):
        load(path.parent)


def edited(path, edit):
    write(path, make())
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return str(caught.value)


def test_other_hdf5_files_are_refused(path):
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros(3)
    with pytest.raises(CheckpointError, match="not a model file of hpcnn"):
        load(path)


def test_a_newer_version_is_refused(path):
    assert "version (=2) must be 1" in edited(path, lambda file: file.attrs.modify("version", 2))


def test_a_dataset_with_other_numbers_is_refused(path):
    def edit(file):
        file["parameters/conv1/bias"][1] += 1

    assert "checksum of '/parameters/conv1/bias'" in edited(path, edit)


def test_a_dataset_without_checksum_is_refused(path):
    assert "model.h5' is damaged" in edited(path, lambda file: file["parameters/conv1/bias"].attrs.pop("crc32"))


def replace(file, **options):
    del file["parameters/conv1/bias"]
    file.create_dataset("parameters/conv1/bias", **options).attrs["crc32"] = 0


def test_a_dataset_that_claims_more_than_the_file_holds_takes_no_memory(path):
    # 4 EB, of which nothing is stored
    assert "must lie contiguous" in edited(path, lambda file: replace(file, shape=(1 << 60,), dtype="f4"))


def test_compressed_datasets_and_other_types_are_refused(path):
    data = np.zeros(1000, np.float32)
    assert "must lie contiguous" in edited(path, lambda file: replace(file, data=data, compression="gzip"))
    assert "must be float32 or float64" in edited(path, lambda file: replace(file, data=data.astype(np.int32)))
    assert "must be float32 or float64" in edited(path, lambda file: replace(file, data=data.astype(">f4")))


def test_links_do_not_lead_out_of_the_file(path):
    other = path.with_name("other.h5")
    write(other, make(seed=5))

    def edit(file):
        del file["parameters/conv1"]
        file["parameters/conv1"] = h5py.ExternalLink(str(other), "/parameters/conv1")

    write(path, make())
    with h5py.File(path, "r+") as file:
        edit(file)
    assert "conv1/weight" not in load(path).parameters


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("culprit", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch, culprit):
    write(path, make())
    good = path.read_bytes()
    monkeypatch.setattr(os, culprit, fail)
    with pytest.raises(CheckpointError, match=r"cannot write '.*model.h5': No space left on device. Earlier"):
        write(path, make(seed=1))
    monkeypatch.undo()
    assert good == path.read_bytes()
    assert os.listdir(path.parent) == ["model.h5"]


def test_a_write_that_fails_in_the_middle_of_the_arrays_leaves_the_old_file(path, monkeypatch):
    write(path, make())
    good = path.read_bytes()
    calls = []

    def crc32(array):
        calls.append(array)
        return fail() if len(calls) == 3 else 0

    monkeypatch.setattr(model_file, "_crc32", crc32)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(path, make(seed=1))
    assert good == path.read_bytes()
    assert os.listdir(path.parent) == ["model.h5"]


def test_an_interrupted_write_leaves_the_old_file(path, monkeypatch):
    write(path, make())
    good = path.read_bytes()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_file, "_crc32", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, make(seed=1))
    assert good == path.read_bytes()
    assert os.listdir(path.parent) == ["model.h5"]


def test_a_full_disk_is_told_and_does_no_harm(path):
    write(path, make())
    good = path.read_bytes()
    big = Checkpoint(model="m", parameters={"fc/weight": np.ones(300_000, np.float32)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write '.*model.h5': File too large. Earlier"):
            write(path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert good == path.read_bytes()
    assert os.listdir(path.parent) == ["model.h5"]
    write(path, big)
    assert load(path).model == "m"


def test_the_file_is_synced_before_it_gets_its_name_and_its_folder_after(path, monkeypatch):
    order = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def replace_file(source, target):
        order.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_file)
    write(path, make())
    assert len(order) == 3
    assert order[0].endswith(".tmp")
    assert order[0].startswith(str(path.parent))
    assert order[1:] == ["replace", str(path.parent)]
