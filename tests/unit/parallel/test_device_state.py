"""State of a model on a device: its initial values, the way to checkpoints and back, and images on their way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hpcnn import arrays
from hpcnn.arrays import Place
from hpcnn.config import TrainConfig
from hpcnn.gpu import Uploads
from hpcnn.nn.model import Model
from hpcnn.parallel.whole import Whole
from hpcnn.plan.planner import make_plan
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train import optimizers
from tests.device import FakeCopies, fake_gpu, on_device
from tests.plans import kinds
from tests.worlds import alone


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    with fake_gpu():
        yield


def make(seed: int, place: Place = "cuda") -> tuple[Model, Whole, optimizers.Optimizer]:
    model = Model(kinds(10), seed, place=place)
    plan = make_plan(model.spec, "data", 1, 4)
    return model, Whole(model, plan, alone()), optimizers.build(TrainConfig(), model.parameters)


def checkpoint(model: Model, whole: Whole, optimizer: optimizers.Optimizer) -> checkpoints.Checkpoint:
    return checkpoints.Checkpoint(
        model=model.spec.name,
        parameters=whole.tensors(model.parameters.values),
        statistics=whole.statistics(),
        optimizer={slot: whole.tensors(flat) for slot, flat in optimizer.state.items()},
    )


def test_a_model_on_a_device_starts_with_the_numbers_of_one_on_the_host() -> None:
    ours, theirs = make(3)[0], make(3, "cpu")[0]
    everything = (ours.parameters.values, ours.parameters.grads, *ours.statistics.values())
    assert all(map(arrays.on_device, everything))
    np.testing.assert_array_equal(ours.parameters.values.get(), theirs.parameters.values)
    for name, own in ours.statistics.items():
        np.testing.assert_array_equal(own.get(), theirs.statistics[name], err_msg=name)


@pytest.mark.parametrize(("source", "target"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_checkpoints_are_those_of_the_host_and_go_back_to_either_place(source: Place, target: Place) -> None:
    draw = np.random.default_rng(1)
    model, whole, optimizer = make(3, source)
    for array in (*optimizer.state.values(), *model.statistics.values()):
        arrays.overwrite(array, draw.standard_normal(array.shape).astype(np.float32))
    saved = checkpoint(model, whole, optimizer)
    assert all(isinstance(tensor, np.ndarray) for tensor in saved.parameters.values())

    other, its_whole, its_optimizer = make(4, target)
    room = its_whole.room(its_optimizer.state, other.statistics)
    checkpoints.restore_into(
        saved,
        model=other.spec.name,
        parameters=room.parameters,
        statistics=room.statistics,
        optimizer=room.state,
    )
    its_whole.take(room, its_optimizer.state)
    pairs = [(other.parameters.values, model.parameters.values)]
    pairs += [(its_optimizer.state[slot], optimizer.state[slot]) for slot in optimizer.state]
    pairs += [(other.statistics[name], model.statistics[name]) for name in model.statistics]
    for found, expected in pairs:
        np.testing.assert_array_equal(arrays.to_host(found), arrays.to_host(expected))


def test_uploads_wait_for_nothing_and_survive_changes_of_their_source() -> None:
    copies, like = FakeCopies(1), on_device(np.zeros(1, np.float32))
    uploads = Uploads(copies, like)
    images = np.empty((2, 3, 3, 1), np.float32)
    begun = []
    for number in range(4):
        images.fill(number)
        begun.append(uploads.begin(images))
        images.fill(np.nan)
    assert np.isnan(begun[-1]._array.memory).all(), "this copy is still on its way"
    for number, upload in enumerate(begun):
        assert upload.shape == images.shape
        np.testing.assert_array_equal(upload.array().get(), number)


def test_an_upload_waits_for_what_still_uses_its_memory() -> None:
    copies = FakeCopies(2)
    seen = []
    uploads = Uploads(copies, on_device(np.zeros(1, np.float32)))
    first = uploads.begin(np.ones(4, np.float32))
    copies.launch(lambda: seen.append(first._array.memory.copy()))
    uploads.begin(np.ones(4, np.float32)).array()
    assert len(seen) == 1, "the kernel that was launched before has run before the copy"
