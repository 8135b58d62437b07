"""Movements bring what is needed, and their way back is the adjoint."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.comm import movement
from hpcnn.geometry import Block
from hpcnn.plan.layout import Box, Layout, extent
from hpcnn.plan.movement import Movement
from tests.checks import spmd_assert
from tests.worlds import world


def random_layout(draw: np.random.Generator, ranks: int) -> Layout:
    """Return a random grid of all ranks."""
    grid = [1, 1, 1, 1]
    for axis in draw.permutation(4):
        divisors = [parts for parts in range(1, ranks + 1) if ranks % parts == 0]
        grid[axis] = int(draw.choice(divisors))
        ranks //= grid[axis]
    return Layout(sample=grid[0], height=grid[1], width=grid[2], channel=grid[3])


def at(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*block) for block in box)


def assert_right(way: Movement, shape: tuple[int, ...], algorithm: str, draw: np.random.Generator) -> None:
    """Move a random tensor there and gradients back, twice over the same buffers."""
    rank, size = world().rank, world().size
    mover = movement.prepare(world().engine, way, np.dtype(float), label="x", algorithm=algorithm)
    for _ in range(2):
        x = draw.standard_normal(shape)
        grads = [draw.standard_normal(extent(box)) for box in way.target]
        owned = np.ascontiguousarray(x[at(way.source[rank])])
        before = world().engine.traffic
        mover.start(owned)
        needed = np.array(mover.finish(owned))
        spmd_assert(world().comm, np.array_equal(x[at(way.target[rank])], needed), "what is needed")
        if way.gathered() is None:
            sent = (world().engine.traffic - before).num_bytes
            spmd_assert(world().comm, sent == 8 * way.num_elements_sent(rank), f"{sent} bytes")
        expected = np.zeros(shape)
        for box, grad in zip(way.target, grads, strict=True):
            expected[at(box)] += grad
        back = np.full_like(owned, np.nan)
        mover.start_back(grads[rank])
        mover.finish_back(grads[rank], back)
        spmd_assert(world().comm, np.allclose(expected[at(way.source[rank])], back, atol=1e-12), "the sums")
        # <F x, g> == <x, F* g>, over all ranks.
        sides = world().comm.allgather((np.vdot(needed, grads[rank]), np.vdot(owned, back)))
        left, right = np.sum(sides, axis=0)
        assert abs(left - right) < 1e-10 * size * x.size


@pytest.mark.parametrize("seed", range(25))
def test_any_boxes_from_any_layout(seed: int) -> None:
    draw, size = np.random.default_rng([seed, 1]), world().size
    shape = tuple(map(int, draw.integers(1, 9, 4)))
    source = random_layout(draw, size).boxes(size, shape[0], shape[1:])
    bounds = np.sort(draw.integers(0, np.array(shape)[:, None] + 1, (size, 4, 2)), axis=2).tolist()
    target = tuple(tuple(Block(*pair) for pair in box) for box in bounds)
    assert_right(Movement(source, target), shape, "auto", draw)


@pytest.mark.parametrize("algorithm", ["auto", "butterfly", "ring", "pairwise", "mpi"])
@pytest.mark.parametrize("layout", ["sample", "channel", "width"])
def test_gathers_by_every_algorithm(layout: str, algorithm: str) -> None:
    draw, size = np.random.default_rng(3), world().size
    shape = (7, 3, 5, 6)
    source = Layout(**{layout: size}).boxes(size, shape[0], shape[1:])
    way = Movement(source, (tuple(Block(0, extent) for extent in shape),) * size)
    assert way.gathered() is not None
    assert_right(way, shape, algorithm, draw)
