"""Stages of butterfly mixing, run on arrays in one process."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.plan.schedules import mixing, num_stages, validate
from tests.in_memory import interpret


def mixed(replicas: list[np.ndarray], stages: int) -> list[np.ndarray]:
    size = len(replicas)
    for index in range(stages):
        stage = index % num_stages(size)
        schedules = [mixing(rank, size, replicas[0].size, stage) for rank in range(size)]
        replicas = [one / 2 for one in interpret(schedules, replicas)]
    return replicas


def drawn(size: int) -> list[np.ndarray]:
    return list(np.random.default_rng(size).standard_normal((size, 6)))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 8, 16])
def test_a_rank_sends_one_message_of_all_elements_a_stage_and_receives_one(size):
    for stage in range(num_stages(size)):
        schedules = [mixing(rank, size, 6, stage) for rank in range(size)]
        validate(schedules)
        assert {(one.num_messages, one.num_elements_sent, one.num_additions) for one in schedules} == {(1, 6, 6)}


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_a_round_of_a_power_of_two_gives_all_ranks_the_mean_in_equal_bits(size):
    replicas = drawn(size)
    after = mixed(replicas, num_stages(size))
    np.testing.assert_allclose(after[0], np.mean(replicas, axis=0), rtol=0, atol=1e-15)
    assert all(np.array_equal(after[0], one) for one in after)
    assert not np.array_equal(*mixed(replicas, num_stages(size) - 1)[:: size - 1]), "a stage would do nothing"


@pytest.mark.parametrize("size", [3, 5, 6, 7, 12])
def test_rounds_of_other_numbers_of_ranks_keep_the_mean_and_come_close_to_it(size):
    replicas = drawn(size)
    mean, spread = np.mean(replicas, axis=0), np.std(replicas)
    for rounds, closeness in ((1, 0.6), (3, 0.1), (12, 1e-4)):
        after = mixed(replicas, rounds * num_stages(size))
        np.testing.assert_allclose(np.mean(after, axis=0), mean, rtol=0, atol=1e-14)
        assert np.abs(np.array(after) - mean).max() < closeness * spread
