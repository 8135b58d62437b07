"""Copies of the state in memory: whoever is left puts the whole together."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import configuration
from hpcnn.comm import World, start
from hpcnn.nn.parameter import ParameterSet
from hpcnn.parallel.whole import Whole
from hpcnn.train import optimizers
from hpcnn.train.kept import Keeper
from hpcnn.train.setup import Parts, assemble
from tests.checks import spmd_assert

RESNET = ("model.name=resnet20", "data.source=synthetic", "data.image_shape=[8, 8, 3]", "train.optimizer=adam")
CASES = {
    "data": (),
    "sharded": ("exchange.kind=sharded", "train.optimizer=adam"),
    "hybrid": ("plan.preset=hybrid", "exchange.kind=auto"),
    "model": (*RESNET, "plan.preset=model", "exchange.kind=sharded"),
}


@pytest.fixture
def world() -> World:
    return start()


class Run:
    """A run whose state is known on all ranks, with NaN where this rank's copy is not current."""

    def __init__(self, world: World, settings: tuple[str, ...]) -> None:
        self.parts: Parts = assemble(configuration.load("lenet5", ["train.global_batch=20", *settings]), world)
        self.optimizer = optimizers.build(self.parts.config.train, self.parts.model.parameters)
        self.whole = Whole(self.parts.model, self.parts.program.plan, world)
        self.keeper = Keeper(self.parts, self.optimizer.state)
        spec = self.parts.model.spec
        self.layout = ParameterSet.of(spec.layers)
        self.statistics = {
            f"{layer.name}/{short}": shape for layer in spec.layers for short, shape in layer.statistics.items()
        }

    def expected(self, step: int) -> dict[str, np.ndarray]:
        """Return global flat vectors, and statistics, as they are after a step."""
        shapes = {"values": self.layout.values.shape, **dict.fromkeys(self.optimizer.state, self.layout.values.shape)}
        shapes |= self.statistics
        return {
            name: np.random.default_rng([step, index]).standard_normal(shape).astype(np.float32)
            for index, (name, shape) in enumerate(shapes.items())
        }

    def make_step(self, step: int) -> None:
        """Give the run the state of a step, and keep it."""
        state, model, found = self.optimizer.state, self.parts.model, self.expected(step)
        room = self.whole.room(state, model.statistics)
        room.parameters.values[...] = found["values"]
        for arrays in (room.state, room.statistics):
            for name, array in arrays.items():
                array[...] = found[name]
        self.whole.take(room, state)
        stale = np.ones(model.parameters.values.size, bool)
        for block in self.parts.program.exchange.owned:
            stale[block.start : block.stop] = False
        for flat in state.values():
            flat[stale] = np.nan
        self.keeper.keep(step, step / 10)


@pytest.mark.parametrize("case", CASES)
def test_the_others_have_all_that_a_rank_takes_with_it(world: World, case: str) -> None:
    run = Run(world, CASES[case])
    for step in (3, 4, 5):
        run.make_step(step)
    lost = world.size // 2 if world.size > 1 else None
    left = world.split(int(world.rank == lost))
    if world.rank == lost:
        return
    if left.rank == left.size - 1:
        run.keeper._copies.pop()  # it had not come to the last copy when the other died
    kept = run.keeper.collect(left)
    spmd_assert(left.comm, (kept is not None) == (left.rank == 0), "the first has it")
    if kept is None:
        return
    assert (kept.step, kept.best_accuracy, kept.model) == (4, 0.4, run.parts.model.spec.name)
    expected = run.expected(4)
    for name, array in kept.statistics.items():
        np.testing.assert_array_equal(array, expected[name])
    for name, array in kept.parameters.items():
        np.testing.assert_array_equal(array, run.layout.view(expected["values"], name))
    assert set(kept.optimizer) == set(run.optimizer.state)
    for slot, tensors in kept.optimizer.items():
        for name, array in tensors.items():
            np.testing.assert_array_equal(array, run.layout.view(expected[slot], name))


def test_a_rank_that_dies_with_the_keeper_of_its_copy_leaves_nothing(world: World) -> None:
    run = Run(world, CASES["sharded"])
    run.make_step(1)
    left = world.split(int(world.rank in (1, 2)))
    if world.size > 3 and world.rank not in (1, 2):
        spmd_assert(left.comm, run.keeper.collect(left) is None, "slices of rank 1 are nowhere")
