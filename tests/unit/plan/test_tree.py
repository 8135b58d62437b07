"""The tree over virtual shards, interpreted in memory: the bits of the sum are the tree's on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.errors import PlanError
from hpcnn.geometry import Block, blocks
from hpcnn.plan import schedules
from hpcnn.plan.schedules import tree
from tests.in_memory import interpret

COUNT = 37


def shards_of(num_shards: int, count: int = COUNT) -> np.ndarray:
    """Return numbers of mixed magnitudes, so that every order of addition rounds differently."""
    draw = np.random.default_rng(num_shards)
    values = draw.standard_normal((num_shards, count)) * 10.0 ** draw.integers(-4, 5, (num_shards, count))
    return values.astype(np.float32)


def canonical(shards: np.ndarray) -> np.ndarray:
    """Return the sum by halves of the next power of two, written down apart from the code under test."""

    def total(start: int, length: int) -> np.ndarray:
        if length == 1:
            return shards[start]
        left = total(start, length // 2)
        return left + total(start + length // 2, length // 2) if start + length // 2 < len(shards) else left

    return total(0, 1 << (len(shards) - 1).bit_length())


def work_arrays(ranks: list, shards: np.ndarray, size: int) -> list[np.ndarray]:
    """Return every rank's array with its pieces, each summed by halves, and nonsense where others' arrive."""
    num_shards, count = shards.shape
    arrays = []
    for schedule, block in zip(ranks, blocks(num_shards, size), strict=True):
        work = np.full(schedule.count, np.nan, np.float32)
        for place, (level, index) in enumerate(tree.pieces(num_shards, block)):
            work[place * count : (place + 1) * count] = canonical(shards[index << level : (index + 1) << level])
        arrays.append(work)
    return arrays


@pytest.mark.parametrize("size", range(1, 34))
def test_sums_have_the_bits_of_the_tree_on_every_number_of_ranks(size):
    for num_shards in {n for n in (size, size + 1, 16, 37, 64) if n >= size}:
        shards = shards_of(num_shards)
        expected = canonical(shards)
        for kind in ("allreduce", "blocks", "whole"):
            completed = blocks(COUNT, size) if kind != "whole" else (Block(0, COUNT),) * size
            ranks = [
                tree.allreduce(rank, size, num_shards, COUNT)
                if kind == "allreduce"
                else tree.sums(rank, size, num_shards, COUNT, completed)
                for rank in range(size)
            ]
            schedules.validate(ranks)
            results = interpret(ranks, work_arrays(ranks, shards, size))
            for result, (start, stop) in zip(results, completed, strict=True):
                own = slice(start, stop) if kind == "blocks" else slice(0, COUNT)
                assert expected[own].tobytes() == result[own].tobytes()


def test_another_order_of_addition_gives_other_bits():
    shards = shards_of(8)
    expected = canonical(shards)
    descending = ((shards[0] + shards[4]) + (shards[2] + shards[6])) + (
        (shards[1] + shards[5]) + (shards[3] + shards[7])
    )
    running = shards[0].copy()
    for shard in shards[1:]:
        running += shard
    assert (expected != descending).mean() > 0.1
    assert (expected != running).mean() > 0.1


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5, 8, 13, 16, 64])
def test_shards_added_one_by_one_leave_the_pieces(num_shards):
    for size in range(1, num_shards + 1):
        for block in blocks(num_shards, size):
            held = tree.pieces(num_shards, block)
            covered = [
                shard for level, index in held for shard in range(index << level, min((index + 1) << level, num_shards))
            ]
            assert list(range(*block)) == covered
            assert len(held) <= tree.depth(num_shards, block) <= num_shards.bit_length() + len(held)
            if num_shards % size == 0 and size & (size - 1) == 0 and num_shards & (num_shards - 1) == 0:
                assert len(held) == 1


def test_one_piece_a_rank_sends_what_recursive_halving_does():
    for size in (2, 4, 8, 16):
        schedule = tree.sums(1, size, 16, 160, blocks(160, size))
        assert schedule.num_messages == size - 1
        assert schedule.num_elements_sent == 160 * (size - 1) // size


def test_more_ranks_than_shards_are_refused():
    with pytest.raises(PlanError, match=r"5 ranks share train.virtual_shards \(=4\)"):
        tree.sums(0, 5, 4, 10, blocks(10, 5))
