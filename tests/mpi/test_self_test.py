"""The doctor's self-test on as many ranks as there are: sums right, pairs complete, bounded, and a fault is noticed."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.analysis import self_test as module
from hpcnn.comm import start


def test_all_sums_are_right_and_every_pair_meets() -> None:
    world = start()
    outcome = module.self_test(world, seconds=1.0)
    assert 0.0 < outcome.seconds < 20.0
    if world.size == 1:
        assert outcome.sums == outcome.pairs == []
    elif world.rank == 0:
        assert {"ring", "butterfly", "mpi"} <= {one.algorithm for one in outcome.sums}
        assert all(one.wrong_ranks == () and one.seconds > 0.0 for one in outcome.sums)
        assert all((one.predicted_s is None) == (one.algorithm == "mpi") for one in outcome.sums)
        if outcome.seconds < 1.0:  # else the time was up before the last round
            everybody = [(low, high) for low in range(world.size) for high in range(low + 1, world.size)]
            assert [pair.ranks for pair in outcome.pairs] == everybody
        assert all(pair.seconds > 0.0 and pair.same_node for pair in outcome.pairs)


def test_an_algorithm_that_is_wrong_on_one_rank_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    world, right = start(), module.allreduce

    def wrong(comm: object, array: np.ndarray, name: str) -> None:
        right(comm, array, name)
        if name == "ring" and world.rank == world.size - 1:
            array[-1] += 1.0

    monkeypatch.setattr(module, "allreduce", wrong)
    monkeypatch.setattr(module, "COUNTS", (1, 1001))
    outcome = module.self_test(world, seconds=0.5)
    if world.rank == 0 and world.size > 1:
        assert {one.algorithm for one in outcome.sums if one.wrong_ranks} == {"ring"}
        assert all(one.wrong_ranks in ((), (world.size - 1,)) for one in outcome.sums)
