"""What a reproducible program rests on: piles, and operators that give the same numbers the same bits each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from hpcnn import ops
from hpcnn.config import ExchangeConfig
from hpcnn.errors import PlanError
from hpcnn.geometry import blocks
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.parallel.reproducible import ReproducibleProgram
from hpcnn.parallel.tree import Pile
from hpcnn.plan.exchanges import choose_buckets
from hpcnn.plan.planner import Plan, make_plan
from hpcnn.plan.schedules import tree
from tests.worlds import alone

BATCH, CLASSES = 13, 10


@pytest.mark.parametrize("num_shards", [1, 2, 5, 8, 11, 16])
def test_a_pile_leaves_sums_of_halves_round_after_round(num_shards: int) -> None:
    draw = np.random.default_rng(3)
    for size in range(1, num_shards + 1):
        for block in blocks(num_shards, size):
            places = np.full((tree.depth(num_shards, block), 9), np.nan, np.float32)
            pile = Pile(num_shards, block, list(places))
            for _ in range(2):
                scales = 10.0 ** draw.integers(-4, 5, (num_shards, 9))
                shards = (draw.standard_normal((num_shards, 9)) * scales).astype(np.float32)
                for shard in range(*block):
                    pile.add(shards[shard])
                for place, (level, number) in zip(places, tree.pieces(num_shards, block), strict=False):
                    assert halves(shards, number << level, 1 << level).tobytes() == place.tobytes()


def halves(shards: np.ndarray, start: int, length: int) -> np.ndarray:
    if length == 1:
        return shards[start]
    left, middle = halves(shards, start, length // 2), start + length // 2
    return left + halves(shards, middle, length // 2) if middle < len(shards) else left


def spec_of(name: str):
    return models.build(name, (8, 8, 3) if name == "resnet20" else (16, 16, 1), CLASSES, 0.0)


def make(
    kind: type[Program], name: str, dtype: type = np.float64, plan: Plan | None = None, shards: int = 4
) -> Program:
    spec = spec_of(name)
    plan = plan or make_plan(spec, "data", 1, BATCH)
    model = Model(spec, 7, dtype)
    buckets = choose_buckets(spec, "allreduce", bucket_bytes=1 << 20, ranks=1, global_batch=BATCH)
    more = {"num_shards": shards} if kind is ReproducibleProgram else {}
    exchange = make_exchange(ExchangeConfig(), spec, plan, buckets, model.parameters, alone(), **more)
    return kind(model, plan, alone(), exchange, label_smoothing=0.1, **more)


class NoUpdate:
    together = False

    def look(self, counted) -> None:
        """Nothing to see."""

    def move(self, block) -> None:
        """Stay."""


@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_shards_in_lock_step_make_the_step_of_the_whole_batch(name: str) -> None:
    draw = np.random.default_rng(5)
    images, labels = draw.standard_normal((BATCH, *spec_of(name).input_shape)), draw.integers(0, CLASSES, BATCH)
    found = []
    for kind in (Program, ReproducibleProgram):
        program = make(kind, name)
        context = program.context(
            training=True, seed=1, step=0, samples=np.arange(100, 100 + BATCH), global_batch=BATCH
        )
        loss, correct = program.train_step(images, labels, context, NoUpdate())
        program.exchange.settle()
        tested = program.evaluate(images, labels, replace(context, training=False))
        found.append((loss, correct, program.model.parameters.grads, program.model.statistics, tested))
    (loss, correct, grads, statistics, tested), (own_loss, own_correct, own_grads, own_statistics, own_tested) = found
    assert (correct, tested[1]) == (own_correct, own_tested[1])
    assert (own_loss, own_tested[0]) == pytest.approx((loss, tested[0]), rel=1e-10)
    assert np.linalg.norm(own_grads - grads) < 1e-10 * np.linalg.norm(grads)
    for key, value in statistics.items():
        np.testing.assert_allclose(own_statistics[key], value, rtol=1e-9, atol=1e-12)


def test_plans_that_cut_layers_and_batches_with_fewer_samples_than_shards_are_refused() -> None:
    plan = make_plan(spec_of("lenet5"), "data", 1, BATCH)
    with pytest.raises(PlanError, match="exchange of their own"):
        make(ReproducibleProgram, "lenet5", plan=replace(plan, exchange=((plan.layouts[-1][0], "sharded"),)))
    with pytest.raises(PlanError, match=r"smaller than the number of virtual shards \(=14\)"):
        make(ReproducibleProgram, "lenet5", shards=14)


def _shifted(x: np.ndarray, by: int) -> np.ndarray:
    """Return a copy that begins `by` bytes behind a cache line, or the array's own memory if 0."""
    room = np.empty(x.nbytes + 128, np.uint8)
    first = -room.ctypes.data % 64 + by
    copy = room[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


CASES: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., object]]] = {
    "convolution": (((5, 9, 9, 6), (16, 3, 3, 6)), lambda x, w: ops.conv2d_forward(x, w, padding=((1, 1), (1, 1)))),
    "its weights": (
        ((5, 9, 9, 6), (5, 9, 9, 16)),
        lambda x, g: ops.conv2d_backward_weight(x, g, (3, 3), padding=((1, 1), (1, 1)))[0],
    ),
    "its input": (
        ((5, 9, 9, 16), (16, 3, 3, 6)),
        lambda g, w: ops.conv2d_backward_input(g, w, (9, 9), padding=((1, 1), (1, 1))),
    ),
    "fully connected": (((5, 300), (37, 300)), lambda x, w: ops.linear_forward(x, w)),
    "its matrix": (((5, 300), (5, 37)), lambda x, g: ops.linear_backward_weight(x, g)[0]),
    "statistics": (((5, 9, 9, 6),), lambda x: np.array(ops.batchnorm_statistics(x))),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_give_the_same_bits_wherever_arrays_lie(case: str) -> None:
    shapes, run = CASES[case]
    draw = np.random.default_rng(1)
    operands = [draw.standard_normal(shape).astype(np.float32) for shape in shapes]
    results = {np.ascontiguousarray(run(*[_shifted(x, by) for x in operands])).tobytes() for by in (0, 4, 16, 36, 0)}
    assert len(results) == 1
