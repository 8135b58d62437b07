"""Checkpoints behind the training: when they are copied, waited for, and what becomes of their errors."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from hpcnn.config import CheckpointConfig
from hpcnn.errors import CheckpointError, DataError
from hpcnn.train.checkpoint import Checkpoint, Store, load
from hpcnn.train.saver import Saver


class Slow(Store):
    """A store that writes when it is let, and fails at some steps."""

    def __init__(self, folder: Path, *, failing: tuple[int, ...] = ()) -> None:
        super().__init__(folder, keep=9)
        self.go = threading.Event()
        self.failing = failing

    def save(self, checkpoint, **names):
        assert self.go.wait(20)
        if checkpoint.step in self.failing:
            raise CheckpointError(f"checkpoint: cannot write step {checkpoint.step}")
        return super().save(checkpoint, **names)


class Run(Saver):
    """A saver with its store and what it has said."""

    def __init__(self, folder: Path, *, failing: tuple[int, ...] = (), **settings) -> None:
        self.said: list[str] = []
        self.store = Slow(folder, failing=failing)
        super().__init__(self.store, CheckpointConfig(**settings), self.said.append)


def snapshot(step: int) -> tuple[Checkpoint, np.ndarray]:
    values = np.full((3, 4), float(step), np.float32).T
    slots = {"velocity": {"fc/weight": np.ones((4, 3), np.float32)}}
    return Checkpoint(model="m", parameters={"fc/weight": values}, optimizer=slots, step=step), values


def step_file(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}.h5"


def test_training_goes_on_while_a_checkpoint_is_written_of_what_was(tmp_path):
    run = Run(tmp_path)
    checkpoint, values = snapshot(3)
    run.save(checkpoint)
    values[:] = -1.0
    assert not step_file(tmp_path, 3).exists()
    run.store.go.set()
    run.settle()
    np.testing.assert_array_equal(load(step_file(tmp_path, 3)).parameters["fc/weight"], np.full((4, 3), 3.0))


@pytest.mark.parametrize("options", [{"wait": True}, {"final": True}])
def test_the_last_one_is_waited_for(tmp_path, options):
    run = Run(tmp_path)
    threading.Timer(0.1, run.store.go.set).start()
    run.save(snapshot(3)[0], **options)
    assert step_file(tmp_path, 3).exists()


def test_so_is_every_one_where_that_is_asked_for(tmp_path):
    run = Run(tmp_path, background=False)
    run.store.go.set()
    run.save(snapshot(3)[0])
    assert step_file(tmp_path, 3).exists()


def test_an_error_waits_until_all_ranks_can_hear_of_it(tmp_path):
    run = Run(tmp_path, failing=(3,))
    run.store.go.set()
    run.save(snapshot(3)[0])
    run.settle()
    assert "cannot write step 3" in str(run.error)
    with pytest.raises(CheckpointError, match="step 3"):
        run.save(snapshot(4)[0])
    assert not step_file(tmp_path, 4).exists()
    assert not run.said


def test_an_error_that_shall_not_end_the_run_is_told_once_and_again_after_a_success(tmp_path):
    run = Run(tmp_path, failing=(1, 2, 4), on_error="continue")
    run.store.go.set()
    for step in range(1, 6):
        run.save(snapshot(step)[0])
    run.settle()
    assert run.error is None
    assert ["step 1" in run.said[0], "step 4" in run.said[1], len(run.said)] == [True, True, 2]
    assert [3, 5] == [step for step in range(9) if step_file(tmp_path, step).exists()]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
@pytest.mark.parametrize("options", [{"wait": True}, {"final": True}])
def test_the_last_one_must_be_written(tmp_path, on_error, options):
    run = Run(tmp_path, failing=(3,), on_error=on_error)
    run.store.go.set()
    with pytest.raises(CheckpointError, match="step 3"):
        run.save(snapshot(3)[0], **options)


@pytest.mark.parametrize(("on_error", "kept", "said"), [("stop", True, 0), ("continue", False, 1)])
def test_records_that_cannot_be_written_are_treated_alike(tmp_path, on_error, kept, said):
    run = Run(tmp_path, on_error=on_error)
    for _ in range(3):
        run.note(DataError("metrics: cannot write"))
    assert (kept, said) == (run.error is not None, len(run.said))
