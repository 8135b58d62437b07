"""Conclusions from what ranks report, one situation each."""

from __future__ import annotations

import pytest

from hpcnn.comm.verdict import Report, Waiting, conclude, name_ranks

HOSTS = [f"n{rank:02}" for rank in range(8)]


def report(starts, waits=None, label="sum of conv4", seconds=65.2, source="engine", **more) -> Report:
    """Return a report of one source; `waits` is the collective in flight, whose count says which start it is."""
    waiting = {} if waits is None else {source: Waiting(waits, label, starts[waits], seconds, **more)}
    return Report(starts={source: starts}, waiting=waiting, alarmed=waits is not None)


def test_a_report_travels_as_bytes():
    original = Report(starts={"a": [1, 2], "b": [0]}, waiting={"a": Waiting(1, "ü", 2, 3.5, "x")}, alarmed=True)
    assert original == Report.decode(original.encode())


def test_a_rank_that_tells_nothing_is_named_with_its_host_and_those_who_wait():
    reports = {rank: report([4, 3], 0) for rank in (0, 1, 3)}
    assert (
        "rank 2 (host n02) has not joined 'sum of conv4' for 65 s, in which ranks 0, 1, 3 wait; the job is ended."
        " Look for what rank 2 was doing while others were at step 17."
    ) == conclude(0, reports, HOSTS[:4], "step 17")


def test_a_rank_that_reports_fewer_starts_is_named():
    reports = {0: report([4, 3], 0), 1: report([3, 3]), 2: report([4, 3], 0)}
    assert conclude(0, reports, HOSTS[:3]).startswith("rank 1 (host n01) has not joined 'sum of conv4' for 65 s")
    assert conclude(0, reports, HOSTS[:3]).endswith("Look for what rank 1 was doing.")


def test_a_rank_that_has_joined_and_waits_for_nothing_is_not_named():
    reports = {0: report([4, 3], 0), 1: report([4, 3]), 2: report([3, 3])}
    assert conclude(0, reports, HOSTS[:3]).startswith("rank 2 (host n02) has not joined")


def test_several_ranks_are_named_together():
    words = conclude(1, {1: report([1], 0)}, HOSTS[:3])
    assert words.startswith("ranks 0 (host n00), 2 (host n02) have not joined 'sum of conv4' for 65 s, in which rank 1")
    assert "in which rank 1 waits; the job is ended. Look for what ranks 0, 2 were doing." in words


def test_the_earlier_collective_that_holds_up_the_others_is_blamed():
    # Ranks 0 and 1 are already in the second one, for which they lack rank 3; that one still waits in the first.
    reports = {
        0: report([1, 1], 1, "sum of conv1"),
        1: report([1, 1], 1, "sum of conv1"),
        3: report([1, 0], 0, "sum of fc8"),
    }
    words = conclude(0, reports, HOSTS[:4])
    assert words.startswith("rank 2 (host n02) has not joined 'sum of fc8'")
    assert "in which rank 3 waits" in words


def test_ranks_that_wait_for_each_other_have_lost_their_order():
    reports = {
        0: report([5, 4], 0, "sum of a"),
        1: report([5, 4], 0, "sum of a", seconds=66.0),
        2: report([4, 5], 1, "sum of b"),
    }
    words = conclude(1, reports, HOSTS[:3], "step 5")
    assert (
        "ranks wait for each other for 65 s at step 5: ranks 0, 1 in 'sum of a', rank 2 in 'sum of b'; all ranks must"
        " start the same collectives in the same order. The job is ended."
    ) in words


def test_ranks_that_wait_in_different_sources_wait_for_each_other_too():
    engine, world = {"engine": [3], "world": [9]}, {"engine": [2], "world": [10]}
    reports = {
        0: Report(starts=engine, waiting={"engine": Waiting(0, "sum of a", 3, 65.0)}, alarmed=True),
        1: Report(starts=world, waiting={"world": Waiting(0, "agreement", 10, 65.0)}, alarmed=True),
    }
    words = conclude(0, reports, HOSTS[:2])
    assert "rank 0 in 'sum of a', rank 1 in 'agreement'" in words


def test_when_all_have_joined_messages_do_not_get_through():
    reports = {rank: report([2], 0, detail=f"messages from rank {1 - rank}") for rank in (0, 1)}
    assert (
        "messages do not get through: rank 1 waits for messages from rank 0; all ranks have joined 'sum of conv4',"
        " which has not ended for 65 s. The job is ended. Look for errors of the network or the MPI library."
    ) == conclude(1, reports, HOSTS[:2])


def test_different_collectives_at_the_same_place_are_told_as_such():
    reports = {0: report([2], 0, "barrier"), 1: report([2], 0, "agreement"), 2: report([2], 0, "agreement")}
    words = conclude(0, reports, HOSTS[:3])
    assert "rank 0 in 'barrier', ranks 1, 2 in 'agreement'; all ranks must start the same" in words


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([2], "rank 2"),
        ([0, 1], "ranks 0, 1"),
        ([0, 1, 3], "ranks 0, 1, 3"),
        ([0, 1, 2, 5, 7, 8, 9, 12, 13], "ranks 0-2, 5, 7-9, 12, 13"),
        (list(range(1024)), "ranks 0-1023"),
    ],
)
def test_ranks_are_listed_shortly(ranks, text):
    assert text == name_ranks(ranks)


def test_hosts_are_told_for_a_few_ranks_only():
    assert "ranks 1 (host n01), 2 (host n02)" == name_ranks([1, 2], HOSTS)
    assert "ranks 0-4" == name_ranks(range(5), HOSTS)


def test_a_collective_of_a_group_is_waited_for_by_its_members_only():
    # Ranks 0 and 2 are a group; rank 2 hangs. Ranks 1 and 3 have gone on and wait for rank 0, which has an excuse.
    group = {"group": (0, 2)}
    starts = {"engine": [1], "group": [4]}
    waits_in_group = Waiting(0, "mixing, stage 1", 4, 65.2)
    waits_in_all = Waiting(0, "loss and correct answers", 2, 65.2)
    reports = {0: Report(starts=starts, waiting={"group": waits_in_group}, alarmed=True, members=group)}
    for peer in (1, 3):
        reports[peer] = Report(starts={"engine": [2], "group": [9]}, waiting={"engine": waits_in_all}, alarmed=True)
    words = conclude(0, reports, list("abcd"))
    assert words.startswith("rank 2 (host c) has not joined 'mixing, stage 1' for 65 s, in which rank 0 waits")
    assert Report.decode(reports[0].encode()).members["group"] == [0, 2]


def test_of_a_group_others_than_its_members_are_never_blamed():
    reports = {
        0: Report(starts={"group": [1]}, waiting={"group": Waiting(0, "sum", 1, 65.2)}, members={"group": (0, 2)})
    }
    reports[2] = Report(starts={"group": [0]})
    assert conclude(0, reports, list("abcd")).startswith("rank 2 (host c) has not joined 'sum'")
