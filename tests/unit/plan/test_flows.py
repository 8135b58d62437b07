"""Flows against the schedules they stand for: the same messages, and the same price as a walk over every rank."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2

import pytest

from hpcnn.plan import flows, pricing, schedules
from hpcnn.plan.fabric import Fabric
from hpcnn.plan.machine import Link, Machine
from hpcnn.plan.schedules import Schedule

ALPHA, BETA, GAMMA = 1e-5, 1e-9, 3e-10
OUTER, INNER = Link(alpha_s=ALPHA, beta_s_per_byte=BETA, crossing=1.5), Link(alpha_s=1e-6, beta_s_per_byte=1e-10)
TWO_LEVELS = Machine(start_s=1e-6, gamma_s_per_byte=GAMMA, node=INNER, network=OUTER)
TREE = Fabric(kind="fat-tree", switch_nodes=(2, 4), oversubscription=(1.0, 4.0), hop_s=1e-7)
TORUS = Fabric(kind="torus", shape=(3, 11), link_speed=0.5, hop_s=2e-7)
COLLECTIVES = [("allreduce", name) for name in schedules.ALLREDUCE_ALGORITHMS]
COLLECTIVES += [(kind, name) for kind in ("allgather", "reduce_scatter") for name in schedules.BLOCK_ALGORITHMS]


def every_schedule(kind: str, algorithm: str, nodes: Sequence[int], count: int) -> list[Schedule]:
    build = getattr(schedules, kind)
    return [build(algorithm, rank, len(nodes), count, nodes=nodes) for rank in range(len(nodes))]


def layouts_of_nodes(size: int) -> list[tuple[int, ...]]:
    """Return nodes of one rank, of two, three and four side by side, and two nodes dealt out in turn."""
    found = [tuple(range(size))]
    found += [tuple(rank // k for rank in range(size)) for k in (2, 3, 4, 8) if size % k == 0]
    return [*found, tuple(rank % 2 for rank in range(size))] if size % 2 == 0 else found


@pytest.mark.parametrize(("kind", "algorithm"), COLLECTIVES)
def test_flows_cost_what_a_walk_over_the_schedules_of_all_ranks_costs(kind, algorithm):
    compared = 0
    for size in range(2, 34):
        count = 5040 * size  # so many that blocks and halves are even, and the longest is every one
        for number, nodes in enumerate(layouts_of_nodes(size)):
            fabric = (None, TREE, TORUS)[(size + number) % 3]
            machine = Machine(start_s=1e-6, gamma_s_per_byte=GAMMA, node=INNER, network=OUTER, fabric=fabric)
            shapes = flows.shapes(kind, algorithm, nodes, fabric, OUTER.crossing)
            if shapes is None:
                continue
            walker = pricing._Pricer(machine, nodes, 4, 2)
            walked = walker.lock_step(every_schedule(kind, algorithm, nodes, count), range(size))
            priced = shapes.seconds(machine, count, 4, 2) - 1e-6
            if kind != "allreduce" and algorithm == "butterfly" and size & (size - 1):
                # A run that wraps is two messages; which rank has it, and whether it leaves the node, is not looked at.
                assert walked * (1 - 2e-5) <= priced <= walked * (1 + 2e-5) + ceil(log2(size)) * ALPHA, (size, nodes)
            else:
                assert priced == pytest.approx(walked, rel=2e-5), (size, nodes)
            compared += 1
    assert compared > 30


@pytest.mark.parametrize(("kind", "algorithm"), COLLECTIVES)
def test_flows_send_what_the_busiest_rank_sends(kind, algorithm):
    for size in (2, 3, 7, 8, 12, 16, 24, 33):
        for nodes in layouts_of_nodes(size):
            shapes = flows.shapes(kind, algorithm, nodes, None, 1.0)
            if shapes is None:
                continue
            busiest = max(s.num_elements_sent for s in every_schedule(kind, algorithm, nodes, 5040 * size))
            assert shapes.sent(5040 * size)[0] == pytest.approx(busiest, rel=1e-4), (size, nodes)


@pytest.mark.parametrize("size", [128, 1024, 8192])
def test_thousands_of_ranks_cost_what_the_formulas_say(size):
    flat, nodes = Link(alpha_s=ALPHA, beta_s_per_byte=BETA), tuple(range(size))
    machine = Machine(start_s=1e-6, gamma_s_per_byte=GAMMA, node=flat, network=flat)
    n, log, part = 4 * 1024 * size, log2(size), (size - 1) / size
    expected = {
        "butterfly": log * (ALPHA + n * BETA + n * GAMMA),
        "halving-doubling": 2 * log * ALPHA + part * n * (2 * BETA + GAMMA),
        "ring": 2 * (size - 1) * ALPHA + part * n * (2 * BETA + GAMMA),
    }
    for name, seconds in expected.items():
        assert pricing.allreduce_seconds(name, n // 4, machine, nodes) == pytest.approx(1e-6 + seconds)
    pairwise = (size - 1) * ALPHA + part * n * BETA
    assert pricing.blocks_seconds("allgather", "pairwise", n // 4, machine, nodes) == pytest.approx(1e-6 + pairwise)


def test_ranks_of_a_node_share_its_port_and_add_at_the_same_time():
    nodes, n = tuple(rank // 32 for rank in range(8192)), 4 << 20
    machine = Machine(
        start_s=0.0, gamma_s_per_byte=GAMMA, node=INNER, network=Link(alpha_s=ALPHA, beta_s_per_byte=BETA)
    )
    inside = 5 * (INNER.alpha_s + n * (INNER.beta_s_per_byte + GAMMA))
    across = 8 * (ALPHA + 32 * n * BETA + n * GAMMA)
    assert pricing.allreduce_seconds("butterfly", n // 4, machine, nodes) == pytest.approx(inside + across)


def test_neither_walks_nor_schedules_are_needed_for_thousands_of_ranks(monkeypatch):
    looked_at = []
    shape = flows._shape
    monkeypatch.setattr(flows, "_shape", lambda *args: looked_at.append(1) or shape(*args))
    monkeypatch.setattr(schedules, "allreduce", lambda *args, **kwargs: pytest.fail("a schedule was built"))
    flows.shapes.cache_clear()
    nodes = tuple(rank // 32 for rank in range(8192))
    for count in range(10_000_000, 10_000_020):
        for algorithm in schedules.ALLREDUCE_ALGORITHMS:
            pricing.allreduce_seconds(algorithm, count, TWO_LEVELS, nodes)
    assert len(looked_at) <= 2 + 13 + 26 + 26


def test_nodes_of_different_sizes_are_left_to_the_walk():
    nodes = (0, 0, 0, 1, 1)
    assert flows.shapes("allreduce", "hierarchical", nodes, None, 1.0) is None
    assert flows.shapes("allreduce", "ring", nodes, None, 1.0) is not None
