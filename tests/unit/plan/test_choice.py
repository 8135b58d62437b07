"""The choice is the cheapest; where the built-in machine stands in, it is what experience says."""

from __future__ import annotations

import pytest

from hpcnn.plan import choice, schedules
from hpcnn.plan.choice import allreduce_algorithm, allreduce_algorithms, block_algorithm
from hpcnn.plan.machine import DEFAULT, Link, Machine
from hpcnn.plan.pricing import allreduce_seconds, blocks_seconds

SLOW = Machine(network=Link(alpha_s=50e-6, beta_s_per_byte=8e-8), gamma_s_per_byte=2e-10)
MAPS = {
    "apart": lambda size: tuple(range(size)),
    "pairs": lambda size: tuple(rank // 2 for rank in range(size)),
    "together": lambda size: (0,) * size,
}


@pytest.mark.parametrize("machine", [DEFAULT, SLOW], ids=["default", "slow"])
@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("size", [2, 3, 5, 8, 12, 16])
def test_no_other_algorithm_is_cheaper(size, where, machine):
    nodes = MAPS[where](size)
    for count in (1, 16, 1024, 31 << 10, 1 << 20):
        chosen = allreduce_algorithm(4 * count, size, machine, nodes)
        prices = {name: allreduce_seconds(name, count, machine, nodes) for name in allreduce_algorithms(nodes)}
        assert prices[chosen] == pytest.approx(min(prices.values()))
        for kind in ("allgather", "reduce_scatter"):
            chosen = block_algorithm(4 * count, size, machine, nodes, kind=kind)
            names = [n for n in schedules.BLOCK_ALGORITHMS if n != "hierarchical" or (where == "pairs" and size > 2)]
            prices = {name: blocks_seconds(kind, name, count, machine, nodes) for name in names}
            assert prices[chosen] == pytest.approx(min(prices.values()))


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 12, 16, 100, 8192])
def test_the_smallest_messages_take_the_butterfly_which_sends_fewest(size):
    assert "butterfly" == allreduce_algorithm(4, size)
    assert "butterfly" == allreduce_algorithm(64, size)


@pytest.mark.parametrize(
    ("size", "expected"), [(2, "halving-doubling"), (3, "ring"), (6, "ring"), (8, "halving-doubling"), (12, "ring")]
)
def test_large_messages_take_what_sends_fewest_bytes(size, expected):
    assert expected == allreduce_algorithm(64 << 20, size)


def test_many_ranks_take_halving_doubling_rather_than_thousands_of_messages():
    assert "halving-doubling" == allreduce_algorithm(4 << 20, 8192)
    assert "halving-doubling" == allreduce_algorithm(4 << 20, 5000)


def test_a_slower_network_moves_the_border_between_few_messages_and_few_bytes():
    assert "butterfly" == allreduce_algorithm(32 << 10, 8)
    assert "halving-doubling" == allreduce_algorithm(32 << 10, 8, SLOW)


def test_narrower_messages_move_it_back():
    border = next(kb for kb in range(1, 1000) if allreduce_algorithm(kb << 10, 8) != "butterfly")
    assert "butterfly" == allreduce_algorithm(border << 10, 8, wire_bytes=2)


def test_hierarchical_is_looked_at_only_where_nodes_have_something_to_share_or_folding_can_be_spared():
    assert "hierarchical" not in allreduce_algorithms((0, 1, 2, 3))
    assert "hierarchical" not in allreduce_algorithms((0, 0, 0, 0))
    assert "hierarchical" in allreduce_algorithms((0, 0, 1, 1))
    assert "hierarchical" in allreduce_algorithms((0, 0, 0))
    assert "hierarchical" == allreduce_algorithm(16 << 20, 12, DEFAULT, (0,) * 12)


def test_algorithms_at_one_price_are_told_apart_by_their_messages_and_then_by_their_place():
    messages = {"many": 9, "few": 3, "as few": 3, "dear": 1}

    class Counted:
        def __init__(self, name: str) -> None:
            self.num_messages = messages[name]

    prices = {"many": 1.0, "few": 1.0, "as few": 1.0, "dear": 2.0}
    assert "few" == choice._cheapest(list(messages), lambda name, limit: prices[name], Counted)


def test_lengths_are_rounded_by_less_than_they_would_tell():
    for count in (1, 2, 31, 32, 33, 63, 64, 65, 1000, 123_456_789):
        assert choice._rounded(count) == pytest.approx(count, rel=1 / 31)
    assert 31 == choice._rounded(31)
    assert len({choice._rounded(count) for count in range(1 << 15)}) < 256


def test_an_empty_array_and_a_single_rank_have_an_algorithm_too():
    for size in (1, 2, 5):
        assert allreduce_algorithm(0, size) in schedules.ALLREDUCE_ALGORITHMS
        assert block_algorithm(0, size) in schedules.BLOCK_ALGORITHMS
    assert allreduce_algorithm(1000, 1) in schedules.ALLREDUCE_ALGORITHMS
