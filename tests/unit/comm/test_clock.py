"""What is made of round trips; the trips themselves are in tests/mpi."""

from __future__ import annotations

import pytest

from hpcnn.comm.clock import Ping, best_offset


def test_the_fastest_round_trip_is_believed():
    # The root is 100 s ahead. Slow trips are slow one way, so their middle is wrong by half of the delay.
    slow_there = Ping(1.0, 101.9, 2.0)
    fast = Ping(3.0, 103.001, 3.002)
    slow_back = Ping(4.0, 104.1, 5.0)
    for pings in ([slow_there, fast, slow_back], [fast, slow_back, slow_there], [slow_back, slow_there, fast]):
        assert best_offset(pings) == pytest.approx(100.0, abs=1e-9)


@pytest.mark.parametrize("root_s", [5.0, 5.0001, 5.0009, 5.001])
def test_clocks_that_may_be_the_same_are_the_same(root_s):
    assert best_offset([Ping(5.0, root_s, 5.001)]) == 0.0


@pytest.mark.parametrize("root_s", [4.999, 5.002, -3.0])
def test_clocks_that_cannot_be_the_same_are_apart(root_s):
    assert best_offset([Ping(5.0, root_s, 5.001)]) == pytest.approx(root_s - 5.0005)
