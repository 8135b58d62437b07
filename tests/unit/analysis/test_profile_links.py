"""What is measured, and what is made of the measurements; the measuring itself needs ranks (tests/mpi)."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.analysis.profile_links import ascending, classes_of, crossings, exchanges, fit_line
from hpcnn.plan import schedules


@pytest.mark.parametrize("summing", [False, True])
@pytest.mark.parametrize(
    "groups", [[[0, 1]], [[0, 1, 2]], [[0, 2, 4, 6]], [[0, 3], [1, 4, 5]], [[2, 0, 1, 3, 4]]], ids=str
)
def test_all_members_of_a_group_send_and_receive_in_every_step_and_nobody_else_does(groups, summing):
    size, count, steps = 7, 10, 5
    ranks = [exchanges(rank, groups, count, steps, summing=summing) for rank in range(size)]
    schedules.validate(ranks)
    members = {rank for group in groups for rank in group}
    for rank, schedule in enumerate(ranks):
        assert steps == len(schedule.steps)
        assert 2 * count == schedule.count
        for step in schedule.steps:
            assert (rank in members) == len(step.sends) == len(step.receives)
            assert ("sum" if summing else "copy") == step.combine
            for peer, start, stop in step.sends + step.receives:
                assert count == stop - start
                assert any(rank in group and peer in group for group in groups)


def test_partners_change_from_step_to_step():
    peers = [step.sends[0].peer for step in exchanges(0, [[0, 1, 2, 3]], 1, 6, summing=False).steps]
    assert [1, 2, 3, 1, 2, 3] == peers


def test_nodes_are_measured_inside_and_by_as_many_ranks_as_all_have_between_them():
    assert {"node": [[0, 1, 2]]} == classes_of((0, 0, 0))
    assert {"network": [[0, 1, 2]]} == classes_of((0, 1, 2))
    assert {"node": [[0, 2], [1, 3]], "network": [[0, 1, 4]]} == classes_of((0, 1, 0, 1, 2))
    assert {"node": [[0, 1, 2], [3, 4]], "network": [[0, 3], [1, 4]]} == classes_of((5, 5, 5, 7, 7))
    assert {} == classes_of((0,))


@pytest.mark.parametrize("lanes", [[[0, 2], [1, 3]], [[0, 3, 6], [1, 4, 7], [2, 5, 8]]], ids=str)
def test_messages_cross_by_one_way_rings_and_by_lanes_at_different_distances(lanes):
    size, count, steps = 10, 12, 4
    kinds = list(zip(*(crossings(rank, lanes, count, steps) for rank in range(size)), strict=True))
    assert (1 if len(lanes[0]) == 2 else 2) == len(kinds)
    node = {rank: number for lane in lanes for number, rank in enumerate(lane)}
    for ranks in kinds:
        schedules.validate(ranks)
        assert {steps} == {len(schedule.steps) for schedule in ranks}
    for index in range(steps):
        one_way = [schedule.steps[index] for schedule in kinds[0]]
        assert set(lanes[-1]) == {rank for rank, step in enumerate(one_way) if step.sends}
        assert set(lanes[0]) == {rank for rank, step in enumerate(one_way) if step.receives}
        for step in one_way:
            assert all(count == stop - start for _, start, stop in step.sends + step.receives)
        for schedule_of in kinds[1:]:
            to = {rank: node[schedule_of[rank].steps[index].sends[0].peer] for rank in node}
            assert len({to[lane[0]] for lane in lanes}) > 1
            assert all(to[rank] != node[rank] for rank in node)


def test_a_line_is_found_again_whatever_the_span_of_its_points():
    sizes = [4 << shift for shift in range(24)]
    alpha, beta = fit_line(sizes, [2e-5 + 3e-9 * size for size in sizes])
    assert 2e-5 == pytest.approx(alpha)
    assert 3e-9 == pytest.approx(beta)


def test_short_messages_count_as_much_as_long_ones():
    sizes = [4, 8, 1 << 20, 1 << 21]
    times = [1e-5, 1e-5, 2e-3, 2e-3]  # no line fits the long ones; the short ones fix alpha all the same
    alpha, _ = fit_line(sizes, times)
    assert 1e-5 == pytest.approx(alpha, rel=0.1)


@pytest.mark.parametrize("times", [[3e-5, 2e-5, 1e-5], [1e-9, 1e-3, 5e-3], [1e-5, 1e-5, 1e-5]])
def test_a_line_never_has_a_message_for_nothing_or_bytes_that_save_time(times):
    alpha, beta = fit_line([4, 1024, 1 << 20], times)
    assert alpha > 0.0
    assert beta >= 0.0


def test_times_are_put_in_order_by_joining_neighbours():
    assert [1.0, 2.0, 3.0] == pytest.approx(ascending([1.0, 2.0, 3.0]))
    assert [1.0, 4.0, 4.0, 9.0] == pytest.approx(ascending([1.0, 8.0, 2.0, 9.0]))
    assert [2.0, 2.0, 2.0] == pytest.approx(ascending([8.0, 1.0, 1.0]))
    noisy = np.random.default_rng(0).uniform(1.0, 2.0, 100)
    assert np.all(np.diff(ascending(noisy)) >= -1e-12)
    assert np.log(noisy).sum() == pytest.approx(np.log(ascending(noisy)).sum())
