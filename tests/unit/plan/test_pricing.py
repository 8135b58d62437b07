"""Prices against the textbook's formulas, which hold on straight lines, and against steps walked through by hand."""

from __future__ import annotations

from math import inf, log2

import pytest

from hpcnn.plan import pricing, schedules
from hpcnn.plan.machine import Link, Machine
from hpcnn.plan.pricing import MOST_EXACT, allreduce_seconds, blocks_seconds, price, representatives
from hpcnn.plan.schedules import Schedule, Step, Transfer

ALPHA, BETA, GAMMA = 1e-5, 1e-9, 3e-10
LINE = Link(alpha_s=ALPHA, beta_s_per_byte=BETA)
FLAT = Machine(start_s=1e-6, gamma_s_per_byte=GAMMA, node=LINE, network=LINE)
INNER = Link(alpha_s=1e-6, beta_s_per_byte=1e-10)
TWO_LEVELS = Machine(start_s=1e-9, gamma_s_per_byte=GAMMA, node=INNER, network=LINE)


def apart(size: int) -> tuple[int, ...]:
    return tuple(range(size))


@pytest.mark.parametrize("size", [2, 4, 16, 64, 128, 1024])
def test_allreduce_of_a_power_of_two_costs_what_the_formulas_say(size):
    count = 1024 * 64
    n, log = 4 * count, log2(size)
    part = (size - 1) / size
    butterfly = log * (ALPHA + n * BETA + n * GAMMA)
    rabenseifner = 2 * log * ALPHA + 2 * part * n * BETA + part * n * GAMMA
    ring = 2 * (size - 1) * ALPHA + 2 * part * n * BETA + part * n * GAMMA
    for name, expected in (("butterfly", butterfly), ("halving-doubling", rabenseifner), ("ring", ring)):
        assert 1e-6 + expected == pytest.approx(allreduce_seconds(name, count, FLAT, apart(size)))


@pytest.mark.parametrize("size", [3, 6, 7, 12, 100])
def test_folding_costs_two_more_messages_than_the_power_of_two_below(size):
    count = 1 << 14
    n, log = 4 * count, int(log2(size))
    expected = (log + 2) * (ALPHA + n * BETA) + (log + 1) * n * GAMMA
    assert 1e-6 + expected == pytest.approx(allreduce_seconds("butterfly", count, FLAT, apart(size)))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 12, 100])
def test_gathering_and_scattering_round_the_ring_costs_what_the_formulas_say(size):
    count = size * 1000
    gather = (size - 1) * (ALPHA + 4000 * BETA)
    scatter = gather + (size - 1) * 4000 * GAMMA
    assert 1e-6 + gather == pytest.approx(blocks_seconds("allgather", "ring", count, FLAT, apart(size)))
    assert 1e-6 + scatter == pytest.approx(blocks_seconds("reduce_scatter", "ring", count, FLAT, apart(size)))


def test_one_rank_costs_nothing():
    assert 0.0 == allreduce_seconds("ring", 100, FLAT, (0,))


def test_a_rank_waits_for_its_partner_and_for_nobody_else():
    # Step 0: 0 and 1 swap much, step 1: 1 and 2 swap little, step 2: 0 and 3 swap little.
    much, little = 1000, 10

    def swap(peer: int, count: int) -> Step:
        return Step((Transfer(peer, 0, count),), (Transfer(peer, 1000, 1000 + count),))

    idle = Step()
    ranks = [
        Schedule((swap(1, much), idle, swap(3, little)), 2000),
        Schedule((swap(0, much), swap(2, little), idle), 2000),
        Schedule((idle, swap(1, little), idle), 2000),
        Schedule((idle, idle, swap(0, little)), 2000),
    ]
    expected = ALPHA + 4 * much * BETA + ALPHA + 4 * little * BETA
    assert 1e-6 + expected == pytest.approx(price(ranks, FLAT, apart(4)))


def test_messages_in_one_direction_follow_one_another_and_both_directions_overlap():
    first = Step((Transfer(1, 0, 10), Transfer(1, 10, 30)), (Transfer(1, 30, 100),))
    second = Step((Transfer(0, 30, 100),), (Transfer(0, 0, 10), Transfer(0, 10, 30)))
    seconds = price([Schedule((first,), 100), Schedule((second,), 100)], FLAT, apart(2))
    assert 1e-6 + max(2 * ALPHA + 120 * BETA, ALPHA + 280 * BETA) == pytest.approx(seconds)


def test_what_the_ranks_of_a_node_send_out_together_shares_its_link():
    # Two nodes of two; each rank swaps with its like on the other node.
    ranks = [Schedule((Step((Transfer(r ^ 2, 0, 100),), (Transfer(r ^ 2, 100, 200),)),), 200) for r in range(4)]
    assert 1e-9 + ALPHA + 800 * BETA == pytest.approx(price(ranks, TWO_LEVELS, (0, 0, 1, 1)))
    assert 1e-9 + ALPHA + 400 * BETA == pytest.approx(price(ranks, TWO_LEVELS, (0, 1, 2, 3)))
    assert 1e-9 + 1e-6 + 400e-10 == pytest.approx(price(ranks, TWO_LEVELS, (0, 1, 0, 1)))
    assert 1e-9 + 1e-6 + 400e-10 == pytest.approx(price(ranks, TWO_LEVELS, (0, 0, 0, 0)))


CROSSING = Machine(
    start_s=1e-9, node=INNER, network=Link(alpha_s=ALPHA, beta_s_per_byte=BETA, crossing=1.5), gamma_s_per_byte=GAMMA
)


def test_bytes_count_more_where_the_ranks_of_a_node_exchange_with_different_nodes():
    def swaps(partner: dict[int, int], size: int) -> list[Schedule]:
        def step(rank: int) -> Step:
            if rank not in partner:
                return Step()
            return Step((Transfer(partner[rank], 0, 100),), (Transfer(partner[rank], 100, 200),))

        return [Schedule((step(rank),), 200) for rank in range(size)]

    both = {0: 2, 2: 0, 1: 3, 3: 1}
    assert 1e-9 + ALPHA + 800 * BETA == pytest.approx(price(swaps(both, 4), CROSSING, (0, 0, 1, 1)))
    apart_again = {0: 2, 2: 0, 1: 4, 4: 1}
    assert 1e-9 + ALPHA + 1200 * BETA == pytest.approx(price(swaps(apart_again, 6), CROSSING, (0, 0, 1, 1, 2, 2)))
    one = {0: 2, 2: 0}
    assert 1e-9 + ALPHA + 400 * BETA == pytest.approx(price(swaps(one, 4), CROSSING, (0, 0, 1, 1)))


def test_bytes_count_more_where_one_rank_of_a_node_sends_and_another_receives():
    def ring(rank: int) -> Schedule:
        return schedules.allgather("ring", rank, 4, 400)

    expected = 1e-9 + 3 * (ALPHA + 1.5 * 400 * BETA)
    assert expected == pytest.approx(price(ring, CROSSING, (0, 0, 1, 1)))
    assert 1e-9 + 3 * (ALPHA + 400 * BETA) == pytest.approx(price(ring, CROSSING, (0, 1, 2, 3)))


def test_hierarchical_allreduce_costs_its_three_parts():
    size, inside = 8, 4
    count, n = 1 << 16, 4 << 16
    nodes = tuple(rank // inside for rank in range(size))
    half = (inside - 1) / inside * n
    inner = 2 * (2 * 1e-6 + half * 1e-10) + half * GAMMA
    # Both of the two nodes' lanes together send n / 2 in each of two steps.
    across = 2 * (ALPHA + n / 2 * BETA)
    seconds = allreduce_seconds("hierarchical", count, TWO_LEVELS, nodes)
    # Adding what came over the link: the line charges all that is on the link.
    assert 1e-9 + inner + across <= seconds
    assert seconds <= 1e-9 + inner + across + n / 2 * GAMMA + 1e-12


def test_a_measured_table_goes_before_the_line():
    table = Link(alpha_s=ALPHA, beta_s_per_byte=BETA, sizes=(4, 400), copy_s=(1.0, 2.0), sum_s=(10.0, 20.0))
    machine = Machine(start_s=1e-6, network=table)
    assert 20.0 == pytest.approx(allreduce_seconds("butterfly", 100, machine, apart(2)))
    assert 2 * 20.0 == pytest.approx(allreduce_seconds("butterfly", 100, machine, apart(4)))
    assert 2.0 == pytest.approx(blocks_seconds("allgather", "ring", 200, machine, apart(2)))


def test_narrow_messages_cost_their_own_bytes_and_the_additions_of_wide_elements():
    wide = price(_butterflies(4, 1000), FLAT, apart(4))
    narrow = price(_butterflies(4, 1000), FLAT, apart(4), wire_bytes=2)
    assert 2 * 2000 * BETA == pytest.approx(wide - narrow)


def _butterflies(size: int, count: int) -> list[Schedule]:
    return [schedules.allreduce("butterfly", rank, size, count) for rank in range(size)]


def test_a_price_above_the_limit_is_given_up():
    true = allreduce_seconds("ring", 10_000, FLAT, apart(12))
    assert inf == allreduce_seconds("ring", 10_000, FLAT, apart(12), limit_s=0.9 * true)
    assert true == allreduce_seconds("ring", 10_000, FLAT, apart(12), limit_s=1.1 * true)
    # Only the folded pairs are slow: the first rank alone would stay below the limit.
    folded = allreduce_seconds("butterfly", 10_000, FLAT, apart(12))
    assert inf == allreduce_seconds("butterfly", 10_000, FLAT, apart(12), limit_s=0.9 * folded)


def test_a_few_ranks_stand_for_many():
    assert MOST_EXACT < 1000
    few = representatives(apart(1000))
    assert {0, 1, 500, 998, 999} <= set(few)
    assert len(few) == pricing.MOST_SAMPLED
    nodes = tuple(rank // 10 for rank in range(1000))
    assert tuple(range(10)) == representatives(nodes)
    nodes = tuple(rank // 4 for rank in range(1000))
    chosen = representatives(nodes)
    assert len(chosen) == pricing.MOST_SAMPLED
    assert {0, 1, 2, 3, 996, 997, 998, 999} <= set(chosen)
    for node in {nodes[rank] for rank in chosen}:  # whole nodes
        assert 4 == sum(nodes[rank] == node for rank in chosen)


@pytest.mark.parametrize("per_node", [1, 4])
@pytest.mark.parametrize("name", ["butterfly", "halving-doubling", "ring", "hierarchical"])
def test_looking_at_a_few_ranks_comes_to_the_same_price_as_looking_at_all(name, per_node, monkeypatch):
    size, count = 64, 4096 * 3
    nodes = tuple(rank // per_node for rank in range(size))
    exact = allreduce_seconds.__wrapped__(name, count, TWO_LEVELS, nodes)
    monkeypatch.setattr(pricing, "MOST_EXACT", 8)
    assert exact == pytest.approx(allreduce_seconds.__wrapped__(name, count, TWO_LEVELS, nodes), rel=0.02)
