"""Schedules are interpreted in memory, for every size up to 33, and counted against the textbook's formulas."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import ceil, log2

import numpy as np
import pytest

from hpcnn.errors import PlanError
from hpcnn.geometry import blocks
from hpcnn.plan import schedules
from hpcnn.plan.schedules import ALLREDUCE_ALGORITHMS, BLOCK_ALGORITHMS, Schedule, Step, Transfer
from tests.in_memory import interpret

SIZES = range(1, 34)


def counts(size: int) -> list[int]:
    return sorted({0, 1, 2, max(0, size - 1), size, size + 1, 127})


def all_ranks(kind: Callable[..., Schedule], algorithm: str, size: int, count: int, *rest) -> list[Schedule]:
    return [kind(algorithm, rank, size, count, *rest) for rank in range(size)]


def random_arrays(size: int, count: int, *, integers: bool) -> list[np.ndarray]:
    generator = np.random.default_rng(size * 1000 + count)
    if integers:
        return [generator.integers(-1000, 1000, count).astype(np.float32) for _ in range(size)]
    return [
        generator.standard_normal(count).astype(np.float32) * 10.0 ** generator.integers(-3, 4) for _ in range(size)
    ]


def canonical_tree(arrays: list[np.ndarray]) -> np.ndarray:
    """Return ((0+1)+(2+3))+..., for a power of two."""
    while len(arrays) > 1:
        arrays = [left + right for left, right in zip(arrays[::2], arrays[1::2], strict=True)]
    return arrays[0]


def folded_tree(arrays: list[np.ndarray]) -> np.ndarray:
    """Return the canonical tree over the ranks left when the first pairs have been added."""
    pairs = len(arrays) - 2 ** int(log2(len(arrays)))
    first = [arrays[2 * i] + arrays[2 * i + 1] for i in range(pairs)]
    return canonical_tree(first + arrays[2 * pairs :])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", ALLREDUCE_ALGORITHMS)
def test_allreduce_leaves_the_exact_sum_of_integers_on_every_rank(algorithm, size):
    for count in counts(size):
        ranks = all_ranks(schedules.allreduce, algorithm, size, count)
        schedules.validate(ranks)
        arrays = random_arrays(size, count, integers=True)
        for result in interpret(ranks, arrays):
            np.testing.assert_array_equal(np.sum(arrays, axis=0), result)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", ALLREDUCE_ALGORITHMS)
def test_allreduce_leaves_the_same_bits_on_every_rank(algorithm, size):
    for count in (size + 1, 127):
        arrays = random_arrays(size, count, integers=False)
        results = interpret(all_ranks(schedules.allreduce, algorithm, size, count), arrays)
        assert 1 == len({result.tobytes() for result in results})


@pytest.mark.parametrize("size", [2, 3, 4, 6, 7, 8, 13, 16, 32, 33])
@pytest.mark.parametrize("algorithm", ["butterfly", "halving-doubling"])
def test_butterfly_and_halving_doubling_add_in_the_canonical_tree(algorithm, size):
    arrays = random_arrays(size, 127, integers=False)
    result = interpret(all_ranks(schedules.allreduce, algorithm, size, 127), arrays)[0]
    np.testing.assert_array_equal(folded_tree(arrays), result)


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_ring_adds_each_block_from_the_rank_before_its_owner_downwards(size):
    arrays = random_arrays(size, 127, integers=False)
    result = interpret(all_ranks(schedules.allreduce, "ring", size, 127), arrays)[0]
    for owner, (start, stop) in enumerate(blocks(127, size)):
        expected = arrays[(owner - 1) % size][start:stop]
        for hop in range(2, size + 1):
            # The receiver adds what comes to its own: own + partial sum.
            expected = arrays[(owner - hop) % size][start:stop] + expected
        np.testing.assert_array_equal(expected, result[start:stop])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", BLOCK_ALGORITHMS)
def test_allgather_brings_every_block_to_every_rank_and_touches_no_own_block(algorithm, size):
    for count in counts(size):
        ranks = all_ranks(schedules.allgather, algorithm, size, count)
        schedules.validate(ranks)
        expected = np.arange(1.0, count + 1)
        starts = []
        for block in blocks(count, size):
            starts.append(np.full(count, np.nan))
            starts[-1][block.start : block.stop] = expected[block.start : block.stop]
        for result in interpret(ranks, starts):
            np.testing.assert_array_equal(expected, result)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", BLOCK_ALGORITHMS)
def test_reduce_scatter_leaves_the_exact_sum_of_its_block_on_every_rank(algorithm, size):
    for count in counts(size):
        ranks = all_ranks(schedules.reduce_scatter, algorithm, size, count)
        schedules.validate(ranks)
        arrays = random_arrays(size, count, integers=True)
        for (start, stop), result in zip(blocks(count, size), interpret(ranks, arrays), strict=True):
            np.testing.assert_array_equal(np.sum(arrays, axis=0)[start:stop], result[start:stop])


@pytest.mark.parametrize("algorithm", BLOCK_ALGORITHMS)
@pytest.mark.parametrize("bounds", [(0, 0, 9, 10, 10), (0, 5, 5, 5, 30, 31), (0, 7), (0, 0, 0, 4)])
def test_explicit_boundaries_decide_who_owns_what(algorithm, bounds):
    size, count = len(bounds) - 1, bounds[-1]
    arrays = random_arrays(size, count, integers=True)
    ranks = all_ranks(schedules.reduce_scatter, algorithm, size, count, bounds)
    schedules.validate(ranks)
    pieces = [r[a:b] for r, (a, b) in zip(interpret(ranks, arrays), pairwise(bounds), strict=True)]
    np.testing.assert_array_equal(np.sum(arrays, axis=0), np.concatenate(pieces))
    ranks = all_ranks(schedules.allgather, algorithm, size, count, bounds)
    schedules.validate(ranks)
    index = np.arange(count)
    starts = [np.where((a <= index) & (index < b), 1.0, np.nan) for a, b in pairwise(bounds)]
    assert all(np.all(result == 1.0) for result in interpret(ranks, starts))


# -- counts: the formulas of the textbook, independent of how the schedules are built ----------------------------------

ROLES = ("single", "folded", "staying")


def role(rank: int, size: int) -> str:
    """Return what folding makes of a rank: of the first 2 f the even ones step aside for the odd ones."""
    folded = size - 2 ** int(log2(size))
    return "single" if rank >= 2 * folded else ("staying" if rank % 2 else "folded")


def expected_messages(algorithm: str, rank: int, size: int) -> int:
    log = int(log2(size))
    if algorithm == "butterfly":
        return {"single": log, "folded": 1, "staying": log + 1}[role(rank, size)]
    if algorithm == "halving-doubling" or (algorithm == "hierarchical" and size == 2**log):
        return {"single": 2 * log, "folded": 2, "staying": 2 * log + 2}[role(rank, size)]
    if algorithm == "hierarchical":  # on one node: reduce-scatter and all-gather in ceil(lg p) steps each
        runs = [min(2**k, size - 2**k) for k in range(ceil(log2(size)))]
        gathered = sum(1 + (rank + run > size) for run in runs)
        scattered = sum(1 + ((rank + 2**k) % size + run > size) for k, run in enumerate(runs))
        return gathered + scattered
    return 2 * (size - 1)


def expected_elements(algorithm: str, rank: int, size: int, count: int) -> int:
    """Return the elements sent when `count` is divisible by everything in sight."""
    log = int(log2(size))
    power = 2**log
    if algorithm == "butterfly":
        return {"single": count * log, "folded": count, "staying": count * (log + 1)}[role(rank, size)]
    if algorithm == "halving-doubling":
        scattered = 2 * count * (power - 1) // power
        fold = count // 2
        return {"single": scattered, "folded": 2 * fold, "staying": fold + scattered + count}[role(rank, size)]
    return 2 * count * (size - 1) // size


@pytest.mark.parametrize("size", range(2, 34))
@pytest.mark.parametrize("algorithm", ALLREDUCE_ALGORITHMS)
def test_allreduce_sends_as_many_messages_and_elements_as_the_formulas_say(algorithm, size):
    count = 64 * size
    for rank, schedule in enumerate(all_ranks(schedules.allreduce, algorithm, size, count)):
        assert expected_messages(algorithm, rank, size) == schedule.num_messages
        assert expected_elements(algorithm, rank, size, count) == schedule.num_elements_sent


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_an_uneven_length_costs_at_most_the_rounding_of_each_message(size):
    for algorithm in ("halving-doubling", "ring"):
        for schedule in all_ranks(schedules.allreduce, algorithm, size, 1009):
            assert abs(schedule.num_elements_sent - 2 * 1009 * (size - 1) / size) <= 2 * size
            assert abs(schedule.num_additions - 1009 * (size - 1) / size) <= size


@pytest.mark.parametrize("size", range(2, 34))
def test_all_but_the_butterfly_add_every_element_p_minus_1_times_in_all(size):
    for algorithm in ("halving-doubling", "ring", "hierarchical"):
        ranks = all_ranks(schedules.allreduce, algorithm, size, 101)
        assert 101 * (size - 1) == sum(schedule.num_additions for schedule in ranks)


@pytest.mark.parametrize("size", range(2, 34))
@pytest.mark.parametrize("algorithm", BLOCK_ALGORITHMS)
def test_allgather_and_reduce_scatter_send_as_the_formulas_say(algorithm, size):
    count = 5 * size
    steps = size - 1 if algorithm in ("ring", "pairwise") else ceil(log2(size))
    gathers = all_ranks(schedules.allgather, algorithm, size, count)
    for rank, gather in enumerate(gathers):
        scatter = schedules.reduce_scatter(algorithm, rank, size, count)
        assert steps == len(gather.steps) == len(scatter.steps)
        assert 5 * (size - 1) == gather.num_elements_sent == scatter.num_additions
        assert sum(stop - start for step in scatter.steps for _, start, stop in step.receives) == 5 * (size - 1)
        wraps = 0
        if algorithm in ("butterfly", "hierarchical") and size & (size - 1):
            runs = [min(2**k, size - 2**k) for k in range(steps)]
            wraps = sum(rank + run > size for run in runs)
        assert steps + wraps == gather.num_messages


@pytest.mark.parametrize("algorithm", BLOCK_ALGORITHMS)
def test_reduce_scatter_is_the_adjoint_of_allgather(algorithm):
    size, bounds = 6, (0, 3, 3, 8, 10, 17, 20)
    generator = np.random.default_rng(1)
    x = [generator.integers(-9, 9, b - a).astype(float) for a, b in pairwise(bounds)]
    g = [generator.integers(-9, 9, 20).astype(float) for _ in range(size)]
    starts = [np.zeros(20) for _ in range(size)]
    for rank, (a, b) in enumerate(pairwise(bounds)):
        starts[rank][a:b] = x[rank]
    gathered = interpret(all_ranks(schedules.allgather, algorithm, size, 20, bounds), starts)
    scattered = interpret(all_ranks(schedules.reduce_scatter, algorithm, size, 20, bounds), g)
    forward = sum(float(y @ weight) for y, weight in zip(gathered, g, strict=True))
    backward = sum(float(x[r] @ scattered[r][bounds[r] : bounds[r + 1]]) for r in range(size))
    assert forward == backward


@pytest.mark.parametrize("size", [2, 5, 8])
def test_pairwise_sends_straight_from_owner_to_reader_at_ascending_distances(size):
    for rank in range(size):
        gather = schedules.allgather("pairwise", rank, size, size)
        scatter = schedules.reduce_scatter("pairwise", rank, size, size)
        for index, (spread, collect) in enumerate(zip(gather.steps, scatter.steps, strict=True), 1):
            right, left = (rank + index) % size, (rank - index) % size
            assert (((right, rank, rank + 1),), ((left, left, left + 1),), "copy") == spread[:3]
            assert (((right, right, right + 1),), ((left, rank, rank + 1),), "sum") == collect[:3]


# -- edges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [
        *[(schedules.allreduce, name) for name in ALLREDUCE_ALGORITHMS],
        *[(schedules.allgather, name) for name in BLOCK_ALGORITHMS],
        *[(schedules.reduce_scatter, name) for name in BLOCK_ALGORITHMS],
    ],
)
def test_one_rank_or_no_elements_need_no_steps(kind, algorithm):
    assert () == kind(algorithm, 0, 1, 17).steps
    assert () == kind(algorithm, 3, 5, 0).steps
    assert () == kind(algorithm, 3, 5, 0, nodes=(0, 0, 1, 1, 1)).steps


def test_a_schedule_of_8192_ranks_is_cheap():
    assert 13 == schedules.allreduce("butterfly", 4711, 8192, 61_000_000).num_messages
    assert 26 == schedules.allreduce("halving-doubling", 4711, 8192, 61_000_000).num_messages
    assert 2 * 8191 == schedules.allreduce("ring", 4711, 8192, 61_000_000).num_messages


def test_unknown_algorithms_and_impossible_numbers_are_refused():
    with pytest.raises(PlanError, match="unknown algorithm 'tree'; it must be one of butterfly"):
        schedules.allreduce("tree", 0, 1, 0)
    with pytest.raises(PlanError, match="unknown algorithm 'halving-doubling'"):
        schedules.allgather("halving-doubling", 0, 2, 4)
    with pytest.raises(PlanError, match=r"rank \(=2\)"):
        schedules.allreduce("ring", 2, 2, 4)
    with pytest.raises(PlanError, match=r"count \(=-1\)"):
        schedules.allreduce("ring", 0, 2, -1)
    for bounds in ((0, 4), (0, 3, 2, 4), (1, 2, 3, 4), (0, 2, 3, 5)):
        with pytest.raises(PlanError, match="4 ascending numbers from 0 to"):
            schedules.allgather("ring", 0, 3, 4, bounds)


def test_validate_finds_a_message_that_nobody_receives():
    good = [Schedule((Step((Transfer(1, 0, 4),), ()),), 4), Schedule((Step((), (Transfer(0, 0, 4),)),), 4)]
    schedules.validate(good)
    for bad in (Step(), Step((), (Transfer(0, 0, 3),)), Step((), (Transfer(1, 0, 4),))):
        with pytest.raises(PlanError, match="step 0 rank"):
            schedules.validate([good[0], Schedule((bad,), 4)])
    with pytest.raises(PlanError, match="all must agree"):
        schedules.validate([good[0], Schedule((), 4)])


def test_validate_finds_elements_used_twice_in_a_step():
    swap = [Schedule((Step((Transfer(1 - r, 0, 4),), (Transfer(1 - r, 0, 4),), "copy"),), 4) for r in range(2)]
    with pytest.raises(PlanError, match=r"\[0, 4\) are received and in use"):
        schedules.validate(swap)
    schedules.validate([Schedule((step.steps[0]._replace(combine="sum"),), 4) for step in swap])
    with pytest.raises(PlanError, match="outside"):
        schedules.validate([Schedule((Step((Transfer(0, 2, 5),), (Transfer(0, 2, 5),), "sum"),), 4)])
