import dataclasses
import os

import numpy as np
import pytest

from hpcnn.errors import CheckpointError
from hpcnn.nn.parameter import ParameterSet
from hpcnn.train import checkpoint
from hpcnn.train.checkpoint import Checkpoint, Store, latest, restore_into, slots_of, tensors_of

ENTRIES = [("conv1/weight", (4, 3, 3, 2), True), ("conv1/bias", (4,), False), ("fc/weight", (3, 5), True)]


def make_parameters(entries=ENTRIES, seed=0):
    parameters = ParameterSet(entries)
    parameters.values[:] = np.random.default_rng(seed).standard_normal(parameters.values.size)
    return parameters


def make(step=1, seed=None, model="lenet5", entries=ENTRIES):
    parameters = make_parameters(entries, step if seed is None else seed)
    state = {"velocity": 3 * parameters.values}
    return Checkpoint(
        model=model,
        parameters=tensors_of(parameters),
        statistics={"norm1/running_mean": np.full(3, step, np.float32)},
        optimizer=slots_of(state, parameters),
        step=step,
    )


def names(folder):
    return sorted(os.listdir(folder))


def damage(path):
    """Change one number in a file without touching the other names of it."""
    content = bytearray(path.read_bytes())
    content[content.index(checkpoint.load(path).parameters["fc/weight"].tobytes())] ^= 0x01
    path.unlink()
    path.write_bytes(content)


def test_the_newest_few_step_files_stay(tmp_path):
    store = Store(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        store.save(make(step))
    assert names(tmp_path / "checkpoints") == ["step-00000015.h5", "step-00000020.h5"]
    assert names(tmp_path) == ["checkpoints"]


def test_the_best_stays_when_its_step_file_goes(tmp_path):
    store = Store(tmp_path, keep=1)
    store.save(make(1))
    store.save(make(2), best=True)
    store.save(make(3))
    assert names(tmp_path / "checkpoints") == ["step-00000003.h5"]
    assert checkpoint.load(tmp_path / "best.h5").step == 2
    store.save(make(4), best=True, final=True)
    assert checkpoint.load(tmp_path / "best.h5").step == 4
    assert checkpoint.load(tmp_path / "final.h5").step == 4
    assert names(tmp_path) == ["best.h5", "checkpoints", "final.h5"]


def test_one_step_may_be_saved_twice(tmp_path):
    store = Store(tmp_path, keep=2)
    store.save(make(1, seed=1), best=True)
    store.save(make(1, seed=2), best=True, final=True)
    store.save(make(1, seed=2), best=True, final=True)
    assert names(tmp_path) == ["best.h5", "checkpoints", "final.h5"]
    expected = make(1, seed=2).parameters["fc/weight"]
    assert np.array_equal(checkpoint.load(tmp_path / "best.h5").parameters["fc/weight"], expected)


def test_file_systems_without_hard_links_get_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    Store(tmp_path, keep=1).save(make(3), final=True)
    assert checkpoint.load(tmp_path / "final.h5").step == 3
    assert names(tmp_path) == ["checkpoints", "final.h5"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for leftover in ("checkpoints/.step-00000007.h5.4711.tmp", ".best.h5.4711.tmp"):
        (tmp_path / leftover).write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("mine")
    Store(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoints", "notes.tmp"]
    assert names(tmp_path / "checkpoints") == []


def test_a_failed_save_keeps_every_earlier_checkpoint(tmp_path, monkeypatch):
    store = Store(tmp_path, keep=1)
    store.save(make(1), best=True)

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"cannot write '.*step-00000002.h5': No space left"):
        store.save(make(2), best=True)
    monkeypatch.undo()
    assert latest(tmp_path).checkpoint.step == 1
    assert checkpoint.load(tmp_path / "best.h5").step == 1
    assert names(tmp_path / "checkpoints") == ["step-00000001.h5"]


def test_a_run_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot use '.*run/checkpoints'"):
        Store(tmp_path / "run", keep=1)


def test_latest_is_the_newest_good_one(tmp_path):
    assert latest(tmp_path) is None
    store = Store(tmp_path, keep=3)
    assert latest(tmp_path) is None
    for step in (9, 10, 100):
        store.save(make(step))
    found = latest(tmp_path)
    assert (found.checkpoint.step, found.warning) == (100, "")


def test_latest_falls_back_with_a_warning_and_the_damaged_file_does_not_push_out_good_ones(tmp_path):
    store = Store(tmp_path, keep=2)
    for step in (10, 20):
        store.save(make(step))
    damage(tmp_path / "checkpoints/step-00000020.h5")
    found = latest(tmp_path)
    assert found.checkpoint.step == 10
    assert "step-00000020.h5' cannot be used" in found.warning or "step-00000020.h5' is damaged" in found.warning
    for step in (12, 14):
        store.save(make(step))
    assert names(tmp_path / "checkpoints") == [f"step-000000{step}.h5" for step in (12, 14, 20)]
    assert latest(tmp_path).checkpoint.step == 14
    store.save(make(22))
    store.save(make(24))
    assert names(tmp_path / "checkpoints") == ["step-00000022.h5", "step-00000024.h5"]


def test_latest_takes_the_final_file_where_the_step_files_are_gone(tmp_path):
    store = Store(tmp_path, keep=1)
    store.save(make(3), best=True)
    store.save(make(8), final=True)
    (tmp_path / "checkpoints/step-00000008.h5").unlink()
    assert latest(tmp_path).checkpoint.step == 8
    damage(tmp_path / "final.h5")
    found = latest(tmp_path)
    assert found.checkpoint.step == 3
    assert "final.h5" in found.warning


def test_latest_refuses_where_all_are_damaged(tmp_path):
    store = Store(tmp_path, keep=2)
    for step in (1, 2):
        store.save(make(step))
        damage(tmp_path / f"checkpoints/step-0000000{step}.h5")
    with pytest.raises(CheckpointError, match=r"none in '.*' can be used.*step-00000002.h5.*step-00000001.h5"):
        latest(tmp_path)


def test_a_checkpoint_goes_back_into_parameters_statistics_and_optimizer(tmp_path):
    saved = make(5)
    path = Store(tmp_path, keep=1).save(saved)
    parameters = make_parameters(seed=99)
    statistics = {"norm1/running_mean": np.zeros(3, np.float32)}
    state = {"velocity": np.zeros_like(parameters.values)}
    loaded = checkpoint.load(path)
    restore_into(loaded, model="lenet5", parameters=parameters, statistics=statistics, optimizer=state)
    assert np.array_equal(make_parameters(seed=5).values, parameters.values)
    assert np.array_equal(3 * make_parameters(seed=5).values, state["velocity"])
    assert np.array_equal(np.full(3, 5), statistics["norm1/running_mean"])


def test_a_file_holds_global_tensors_in_the_order_of_their_axes_whatever_lies_in_memory(tmp_path):
    path = Store(tmp_path / "ours", keep=1).save(make(5))
    plain = {name: np.ascontiguousarray(tensor) for name, tensor in make(5).parameters.items()}
    state = {"velocity": {name: np.ascontiguousarray(3 * tensor) for name, tensor in plain.items()}}
    written = dataclasses.replace(make(5), parameters=plain, optimizer=state)
    other = Store(tmp_path / "other", keep=1).save(written)
    assert not make(5).parameters["fc/weight"].flags.c_contiguous
    assert path.read_bytes() == other.read_bytes()


def test_weights_and_their_state_come_back_under_their_shapes(tmp_path):
    weight = np.arange(15, dtype=np.float32).reshape(3, 5)
    given = make(5)
    tensors = dict(given.parameters) | {"fc/weight": weight}
    state = {"velocity": dict(given.optimizer["velocity"]) | {"fc/weight": weight + 100}}
    path = Store(tmp_path, keep=1).save(dataclasses.replace(given, parameters=tensors, optimizer=state))
    parameters = make_parameters(seed=99)
    flat = {"velocity": np.zeros_like(parameters.values)}
    restore_into(checkpoint.load(path), model="lenet5", parameters=parameters, optimizer=flat)
    assert np.array_equal(weight, parameters["fc/weight"].value)
    assert np.array_equal(weight + 100, slots_of(flat, parameters)["velocity"]["fc/weight"])
    start, stop = parameters.offsets["fc/weight"]
    assert np.array_equal(weight.T.ravel(), parameters.values[start:stop])
    assert np.array_equal(weight.T.ravel() + 100, flat["velocity"][start:stop])


def test_parameters_alone_may_go_into_a_model_of_any_state():
    parameters = make_parameters(seed=99)
    restore_into(make(5), model="lenet5", parameters=parameters)
    assert np.array_equal(make_parameters(seed=5).values, parameters.values)


def test_a_checkpoint_of_another_model_is_refused_with_everything_that_differs():
    ours = [("conv1/weight", (4, 5, 5, 2), True), ("conv1/bias", (4,), False), ("conv2/weight", (1, 1, 1, 4), True)]
    parameters = make_parameters(ours, seed=99)
    before = parameters.values.copy()
    with pytest.raises(CheckpointError) as caught:
        restore_into(make(model="vgg16"), model="lenet5", parameters=parameters)
    message = str(caught.value)
    assert "is of 'vgg16', this run's model is 'lenet5'" in message
    assert "missing: conv2/weight;" in message
    assert "not of this model: fc/weight;" in message
    assert "of another shape: conv1/weight (4, 3, 3, 2) instead of (4, 5, 5, 2)." in message
    assert np.array_equal(before, parameters.values)


def test_long_lists_of_differences_are_cut():
    entries = [(f"layer{index}/weight", (2,), True) for index in range(9)]
    with pytest.raises(CheckpointError, match=r"missing: layer0/weight, .*layer4/weight and 4 more; not"):
        restore_into(make(), model="lenet5", parameters=make_parameters(entries))


def test_state_of_another_optimizer_and_missing_statistics_are_refused():
    parameters = make_parameters(seed=99)
    before = parameters.values.copy()
    state = {"first_moment": np.zeros_like(parameters.values)}
    with pytest.raises(
        CheckpointError, match=r"missing: optimizer/first_moment/.*not of this model: optimizer/velocity/"
    ):
        restore_into(make(), model="lenet5", parameters=parameters, optimizer=state)
    with pytest.raises(CheckpointError, match=r"missing: norm2/running_mean; not of this model: norm1/running_mean"):
        restore_into(
            make(), model="lenet5", parameters=parameters, statistics={"norm2/running_mean": np.zeros(3, np.float32)}
        )
    assert np.array_equal(before, parameters.values)
