"""Collectives that know the nodes: right on any map of ranks to nodes, and sparing between nodes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import log2

import numpy as np
import pytest

from hpcnn.errors import PlanError
from hpcnn.geometry import blocks
from hpcnn.plan import schedules
from hpcnn.plan.schedules import Schedule, Transfer
from tests.in_memory import interpret

Nodes = tuple[int, ...]

KINDS = [schedules.allreduce, schedules.allgather, schedules.reduce_scatter]
UNEVEN: list[Nodes] = [
    (0, 0, 0, 1),
    (0, 1, 1, 1),
    (0, 0, 0, 0, 0, 1, 1, 2),
    (2, 0, 1, 0, 0, 1, 0, 0),
    (0, 0, 0, 1, 1),
    (5, 5, -1, 5, -1, 5, -1),
    (0,) * 7 + (1,) * 3 + (2,) * 5,
    (0, 0, 0, 0, 1, 1, 1, 1, 2, 2),
    (0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 0),
]


def contiguous(num_nodes: int, num_ranks: int) -> Nodes:
    return tuple(node for node in range(num_nodes) for _ in range(num_ranks))


def dealt_out(num_nodes: int, num_ranks: int) -> Nodes:
    return tuple(range(num_nodes)) * num_ranks


def maps(size: int) -> list[Nodes]:
    """Return nodes of one rank, filled-up nodes, ranks dealt out, ranks scattered, and one node."""
    scattered = np.random.default_rng(size).integers(0, 1 + size // 3, size)
    return [
        tuple(range(size)),
        tuple(rank // 4 for rank in range(size)),
        tuple(rank % 3 for rank in range(size)),
        tuple(scattered.tolist()),
        (9,) * size,
    ]


def all_ranks(kind: Callable[..., Schedule], nodes: Nodes, count: int, *rest) -> list[Schedule]:
    ranks = [kind("hierarchical", rank, len(nodes), count, *rest, nodes=nodes) for rank in range(len(nodes))]
    schedules.validate(ranks)
    return ranks


def inputs(size: int, count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(count).integers(-1000, 1000, (size, count)).astype(np.float64))


def away(nodes: Nodes, rank: int, schedule: Schedule) -> list[Transfer]:
    """Return the messages that leave the rank's node."""
    return [send for step in schedule.steps for send in step.sends if nodes[send.peer] != nodes[rank]]


def length(transfers: list[Transfer]) -> int:
    return sum(transfer.stop - transfer.start for transfer in transfers)


def check_allreduce(nodes: Nodes, count: int) -> None:
    arrays = inputs(len(nodes), count)
    for result in interpret(all_ranks(schedules.allreduce, nodes, count), arrays):
        np.testing.assert_array_equal(np.sum(arrays, axis=0), result)


def check_allgather(nodes: Nodes, bounds: tuple[int, ...]) -> None:
    index = np.arange(bounds[-1])
    starts = [np.where((a <= index) & (index < b), index + 1.0, np.nan) for a, b in pairwise(bounds)]
    ranks = all_ranks(schedules.allgather, nodes, bounds[-1], bounds)
    for result in interpret(ranks, starts):
        np.testing.assert_array_equal(index + 1.0, result)
    for schedule, (a, b) in zip(ranks, pairwise(bounds), strict=True):
        received = [r for step in schedule.steps for r in step.receives]
        assert length(received) == bounds[-1] - (b - a)
        assert a == b or all(r.stop <= a or b <= r.start for r in received)


def check_reduce_scatter(nodes: Nodes, bounds: tuple[int, ...]) -> None:
    arrays = inputs(len(nodes), bounds[-1])
    results = interpret(all_ranks(schedules.reduce_scatter, nodes, bounds[-1], bounds), arrays)
    mine = [result[a:b] for result, (a, b) in zip(results, pairwise(bounds), strict=True)]
    np.testing.assert_array_equal(np.sum(arrays, axis=0), np.concatenate(mine))


def even_bounds(size: int, count: int) -> tuple[int, ...]:
    return (0, *[block.stop for block in blocks(count, size)])


def uneven_bounds(size: int, count: int, seed: int) -> tuple[int, ...]:
    cuts = np.random.default_rng(seed).integers(0, count + 1, size - 1)
    return (0, *sorted(cuts.tolist()), count)


@pytest.mark.parametrize("size", range(1, 34))
def test_every_collective_is_right_on_every_map_of_ranks_to_nodes(size):
    for nodes in maps(size):
        for count in sorted({0, 1, 2, size - 1, size, size + 1, 127}):
            check_allreduce(nodes, count)
        for count in sorted({1, size - 1, size + 1, 127}):
            check_allgather(nodes, even_bounds(size, count))
            check_reduce_scatter(nodes, even_bounds(size, count))


@pytest.mark.parametrize("nodes", UNEVEN)
def test_every_collective_is_right_on_nodes_of_different_sizes_and_blocks_of_any(nodes):
    size = len(nodes)
    for count in (1, 2, size - 1, size, 61, 240):
        check_allreduce(nodes, count)
        for bounds in (even_bounds(size, count), uneven_bounds(size, count, 1), (0,) * size + (count,)):
            check_allgather(nodes, bounds)
            check_reduce_scatter(nodes, bounds)


@pytest.mark.parametrize("nodes", [contiguous(3, 3), dealt_out(4, 3), *UNEVEN])
def test_hierarchical_allreduce_leaves_the_same_bits_on_every_rank(nodes):
    generator = np.random.default_rng(3)
    arrays = [generator.standard_normal(127) * 10.0 ** generator.integers(-3, 4) for _ in nodes]
    results = interpret(all_ranks(schedules.allreduce, nodes, 127), arrays)
    assert 1 == len({result.tobytes() for result in results})


@pytest.mark.parametrize(("num_nodes", "num_ranks"), [(1, 8), (2, 1), (2, 4), (4, 2), (4, 8), (8, 4)])
def test_on_nodes_filled_in_order_by_powers_of_two_it_is_halving_doubling(num_nodes, num_ranks):
    nodes = contiguous(num_nodes, num_ranks)
    for rank, schedule in enumerate(all_ranks(schedules.allreduce, nodes, 1001)):
        assert schedules.allreduce("halving-doubling", rank, len(nodes), 1001) == schedule


@pytest.mark.parametrize("order", [contiguous, dealt_out])
@pytest.mark.parametrize(("num_nodes", "num_ranks"), [(2, 2), (2, 3), (3, 2), (4, 4), (5, 3), (6, 4), (8, 1), (3, 8)])
def test_allreduce_on_even_nodes_sends_as_the_formulas_say(order, num_nodes, num_ranks):
    nodes, unit = order(num_nodes, num_ranks), num_nodes * num_ranks
    count = 8 * unit
    for rank, schedule in enumerate(all_ranks(schedules.allreduce, nodes, count)):
        outside = away(nodes, rank, schedule)
        power_of_two = num_nodes & (num_nodes - 1) == 0
        assert (2 * int(log2(num_nodes)) if power_of_two else 2 * (num_nodes - 1)) == len(outside)
        assert 2 * (num_nodes - 1) * count // unit == length(outside)
        assert 2 * (num_ranks - 1) * count // num_ranks == schedule.num_elements_sent - length(outside)


@pytest.mark.parametrize("nodes", UNEVEN)
def test_allreduce_on_uneven_nodes_sends_between_nodes_in_lanes_only(nodes):
    sizes = [nodes.count(node) for node in sorted(set(nodes))]
    lanes, num_nodes = min(sizes), len(sizes)
    count = 840 * num_nodes
    for rank, schedule in enumerate(all_ranks(schedules.allreduce, nodes, count)):
        own, number = nodes.count(nodes[rank]), nodes[:rank].count(nodes[rank])
        outside = away(nodes, rank, schedule)
        expected = 2 * (num_nodes - 1) * count // (num_nodes * lanes) if number < lanes else 0
        assert abs(expected - length(outside)) <= 2 * num_nodes
        assert {nodes[: send.peer].count(nodes[send.peer]) for send in outside} <= {number}
        inside = schedule.num_elements_sent - length(outside)
        # Blocks to their lanes, and the lane's share back to their owners: at most one block and one share more.
        assert inside <= 2 * count * (own - 1) / own + count / own + count / lanes + 2 * own


@pytest.mark.parametrize("nodes", [contiguous(3, 4), dealt_out(3, 4), contiguous(4, 3), *UNEVEN])
@pytest.mark.parametrize("seed", [None, 1])
def test_allgather_brings_every_foreign_element_to_a_node_once(nodes, seed):
    size, count = len(nodes), 60 * len(nodes)
    bounds = even_bounds(size, count) if seed is None else uneven_bounds(size, count, seed)
    ranks = all_ranks(schedules.allgather, nodes, count, bounds)
    arrivals = {node: np.zeros(count, int) for node in nodes}
    for rank, schedule in enumerate(ranks):
        for peer, start, stop in (r for step in schedule.steps for r in step.receives):
            arrivals[nodes[rank]][start:stop] += nodes[peer] != nodes[rank]
    for node, times in arrivals.items():
        foreign = np.repeat([owner != node for owner in nodes], np.diff(bounds))
        np.testing.assert_array_equal(foreign.astype(int), times)


@pytest.mark.parametrize("nodes", [(0,) * 5 + (1,) * 2 + (2,), contiguous(4, 3), contiguous(3, 4)])
def test_a_contiguous_node_sends_at_most_one_message_a_lane_to_each_other_node_and_shares_the_work(nodes):
    size, count = len(nodes), 840
    bounds = uneven_bounds(size, count, 5)
    lanes = min(nodes.count(node) for node in nodes)
    largest = max(sum(b - a for (a, b), of in zip(pairwise(bounds), nodes) if of == node) for node in nodes)
    others = len(set(nodes)) - 1
    for rank, schedule in enumerate(all_ranks(schedules.allgather, nodes, count, bounds)):
        outside = away(nodes, rank, schedule)
        assert len(outside) <= others
        # A cut moves by at most an eighth of a part.
        assert length(outside) <= others * (1.25 * largest / lanes + 1)


@pytest.mark.parametrize(
    "sizes", [[50] * 12, [51] * 7 + [50] * 5, [48, 52, 50, 51] * 3, [51, 50, 49, 53, 50] * 2 + [50, 48]]
)
def test_lanes_of_ranks_dealt_out_cross_in_one_message_a_step_if_their_blocks_are_nearly_equal(sizes):
    bounds = (0, *np.cumsum(sizes).tolist())
    for rank, schedule in enumerate(all_ranks(schedules.allgather, dealt_out(4, 3), bounds[-1], bounds)):
        assert [sizes[rank], sizes[rank] + sizes[rank ^ 1]] == [
            send.stop - send.start for send in away(dealt_out(4, 3), rank, schedule)
        ]


@pytest.mark.parametrize("order", [contiguous, dealt_out])
def test_equal_blocks_cross_once_to_each_other_node_from_their_own_lane(order):
    nodes = order(3, 4)
    for rank, schedule in enumerate(all_ranks(schedules.allgather, nodes, 120)):
        assert 2 * 10 == length(away(nodes, rank, schedule))
        assert 120 - 10 == schedule.num_elements_sent


@pytest.mark.parametrize("nodes", [dealt_out(3, 2), contiguous(2, 3), (0, 0, 1, 0, 2, 1)])
def test_hierarchical_reduce_scatter_is_the_adjoint_of_allgather(nodes):
    bounds = (0, 3, 3, 8, 10, 17, 20)
    generator = np.random.default_rng(1)
    x = [generator.integers(-9, 9, b - a).astype(float) for a, b in pairwise(bounds)]
    g = [generator.integers(-9, 9, 20).astype(float) for _ in nodes]
    starts = [np.zeros(20) for _ in nodes]
    for rank, (a, b) in enumerate(pairwise(bounds)):
        starts[rank][a:b] = x[rank]
    gathered = interpret(all_ranks(schedules.allgather, nodes, 20, bounds), starts)
    scattered = interpret(all_ranks(schedules.reduce_scatter, nodes, 20, bounds), g)
    forward = sum(float(y @ weight) for y, weight in zip(gathered, g, strict=True))
    backward = sum(float(x[r] @ scattered[r][a:b]) for r, (a, b) in enumerate(pairwise(bounds)))
    assert forward == backward


@pytest.mark.parametrize("size", [2, 5, 8])
def test_without_nodes_all_ranks_are_on_one(size):
    for rank in range(size):
        for kind in KINDS:
            assert kind("hierarchical", rank, size, 97) == kind("hierarchical", rank, size, 97, nodes=(4,) * size)
        for kind in KINDS[1:]:
            assert kind("hierarchical", rank, size, 97) == kind("butterfly", rank, size, 97)


def test_names_of_nodes_do_not_matter_and_lists_will_do():
    for kind in KINDS:
        assert kind("hierarchical", 3, 5, 97, nodes=[0, 1, 0, 1, 1]) == kind(
            "hierarchical", 3, 5, 97, nodes=(8, -2, 8, -2, -2)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["butterfly", "hierarchical"])
def test_a_map_of_another_length_is_refused(kind, algorithm):
    with pytest.raises(PlanError, match=r"nodes \(=3 numbers\) must name one node for each of 4 ranks"):
        kind(algorithm, 0, 4, 8, nodes=(0, 0, 1))


def test_a_hierarchical_schedule_of_8192_ranks_is_cheap():
    nodes = tuple(rank % 128 for rank in range(8192))
    schedule = schedules.allreduce("hierarchical", 4711, 8192, 61_000_000, nodes=nodes)
    assert 2 * 6 + 2 * 7 == schedule.num_messages
    schedule = schedules.allgather("hierarchical", 4711, 8192, 8192 * 1000, nodes=nodes)
    assert 8191 * 1000 == schedule.num_elements_sent
