"""Shared links against a simulation of messages as fluids, routed over a graph link by link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import product

import numpy as np
import pytest

from hpcnn.errors import PlanError
from hpcnn.plan.fabric import Fabric
from hpcnn.plan.machine import Link, Machine
from hpcnn.plan.pricing import price
from hpcnn.plan.schedules import Schedule, Step, Transfer

Path = list[Hashable]


def seconds_until_all_have_arrived(
    paths: Sequence[Path], sizes: Sequence[float], speeds: dict[Hashable, float]
) -> float:
    """Return when the last of some messages has arrived that begin together and share links fairly (max-min)."""
    left, now = dict(enumerate(map(float, sizes))), 0.0
    while left:
        rates: dict[int, float] = {}
        free = dict(speeds)
        while len(rates) < len(left):
            waiting = [message for message in left if message not in rates]
            users = Counter(link for message in waiting for link in paths[message])
            tightest = min(users, key=lambda link: free[link] / users[link])
            share = free[tightest] / users[tightest]
            for message in (one for one in waiting if tightest in paths[one]):
                rates[message] = share
                for link in paths[message]:
                    free[link] -= share
        passing = min(left[message] / rates[message] for message in left)
        now += passing
        left = {m: rest - rates[m] * passing for m, rest in left.items() if rest - rates[m] * passing > 1e-9}
    return now


def through_the_tree(source: int, target: int, switch: int) -> Path:
    """Return the links of a fat tree of one level of switches below its top."""
    up, down = source // switch, target // switch
    middle: Path = [] if up == down else [("up", up), ("down", down)]
    return [("out", source), *middle, ("in", target)]


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0])
def test_a_fat_tree_takes_as_long_as_fluids_would(shift, factor):
    nodes, switch, num_bytes = 12, 4, 1000
    fabric = Fabric(kind="fat-tree", switch_nodes=(switch,), oversubscription=(factor,))
    source = np.arange(nodes)
    target = (source + shift) % nodes
    paths = [through_the_tree(s, t, switch) for s, t in zip(source, target, strict=True)]
    speeds: dict[Hashable, float] = {link: 1.0 for path in paths for link in path}
    speeds |= {(way, index): switch / factor for way in ("up", "down") for index in range(nodes // switch)}
    expected = seconds_until_all_have_arrived(paths, [num_bytes] * nodes, speeds)
    busiest = fabric.passage(source, target, np.full(nodes, num_bytes)).busiest
    assert max(busiest, num_bytes) == pytest.approx(expected)


def step_by_step(source: int, target: int, shape: tuple[int, ...]) -> Path:
    """Return the directed links of a walk along the first axis, then the second, ..., the shorter way round."""
    here, there = list(np.unravel_index(source, shape)), np.unravel_index(target, shape)
    links: Path = []
    for axis, size in enumerate(shape):
        ahead = (there[axis] - here[axis]) % size
        direction = 1 if 2 * ahead <= size else -1
        while here[axis] != there[axis]:
            links.append((tuple(int(index) for index in here), axis, direction))
            here[axis] = (here[axis] + direction) % size
    return links


@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 4)])
def test_a_torus_is_as_busy_as_its_links_counted_one_by_one(shape):
    rng = np.random.default_rng(7)
    size = int(np.prod(shape))
    source, target = rng.permutation(size), rng.permutation(size)
    source, target = source[source != target], target[source != target]
    num_bytes = rng.integers(1, 100, source.size)
    loads: Counter[Hashable] = Counter()
    lengths = []
    for s, t, n in zip(source, target, num_bytes, strict=True):
        path = step_by_step(s, t, shape)
        lengths.append(len(path))
        loads.update({link: int(n) for link in path})
    passage = Fabric(kind="torus", shape=shape, link_speed=0.5).passage(source, target, num_bytes)
    assert passage.busiest == pytest.approx(max(loads.values()) / 0.5)
    assert passage.hops == max(lengths) - 1


def test_a_step_of_ranks_that_share_ports_and_uplinks_lasts_as_long_as_fluids_would():
    """Two ranks a node, two nodes a switch, two switches with a third of the bandwidth upwards."""
    switch, factor, length, beta = 2, 3.0, 500, 1e-9
    nodes = tuple(rank // 2 for rank in range(8))
    fabric = Fabric(kind="fat-tree", switch_nodes=(switch,), oversubscription=(factor,), hop_s=1e-6)
    port = Link(alpha_s=1e-5, beta_s_per_byte=beta)
    machine = Machine(start_s=0.0, node=port, network=port, fabric=fabric)
    for shift in (2, 4):
        ranks = [
            Schedule(
                (Step((Transfer((r + shift) % 8, 0, length),), (Transfer((r - shift) % 8, length, 2 * length),)),), 1000
            )
            for r in range(8)
        ]
        paths = [through_the_tree(nodes[r], nodes[(r + shift) % 8], switch) for r in range(8)]
        speeds: dict[Hashable, float] = {link: 1 / beta for path in paths for link in path}
        speeds |= dict.fromkeys(product(("up", "down"), range(2)), switch / factor / beta)
        expected = seconds_until_all_have_arrived(paths, [4 * length] * 8, speeds)
        assert price(ranks, machine, nodes) == pytest.approx(1e-5 + 2e-6 + expected)


def test_messages_under_one_switch_meet_nothing():
    fabric = Fabric(kind="fat-tree", switch_nodes=(4, 8), oversubscription=(2.0, 4.0), hop_s=1e-7)
    assert fabric.passage(np.array([0, 1]), np.array([1, 2]), np.array([10, 10])) == (0.0, 0)
    assert fabric.passage(np.array([0]), np.array([7]), np.array([10])) == (10 * 2 / 4, 2)
    assert fabric.passage(np.array([0]), np.array([8]), np.array([10])) == (max(10 * 2 / 4, 10 * 4 / 8), 4)


def test_a_torus_refuses_more_nodes_than_it_has():
    with pytest.raises(PlanError, match="a torus of 2 x 3 has 6 nodes, and 7 are asked for"):
        Fabric(kind="torus", shape=(2, 3)).check_nodes(7)
