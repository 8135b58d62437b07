"""What is read from a trace, against what was put in and against counting on a fine grid."""

from __future__ import annotations

import random

import pytest

from hpcnn.report.run import read_run
from hpcnn.report.traced import TracedSpan, covered


@pytest.fixture
def trace(make_run):
    return read_run(make_run()).trace


def test_the_first_step_does_not_count(trace):
    assert trace.counted == ["step 2", "step 3"]
    assert trace.typical_step() in trace.counted


def test_time_of_ranks_is_what_was_recorded(trace):
    for number, time in enumerate(trace.rank_times()):
        assert time.name == f"rank {number} (node{number})"
        # forward 1, error 1, weight gradient 1 + rank, update 1
        assert time.compute_s == pytest.approx(0.004 + 0.001 * number, abs=1e-8)
        assert time.message_wait_s == pytest.approx(0.002, abs=1e-8)
        assert time.image_wait_s == pytest.approx(0.001, abs=1e-8)
        assert sum(time[1:]) == pytest.approx(0.010, abs=1e-8)


def test_time_of_layers_is_the_mean_over_ranks_and_the_slowest(trace):
    (layer,) = trace.layer_times().values()
    assert layer.forward_s == pytest.approx(0.001, abs=1e-8)
    assert layer.backward_s == pytest.approx(0.0025, abs=1e-8)
    assert layer.slowest_s == pytest.approx(0.004, abs=1e-8)


def test_messages_are_the_mean_of_ranks(trace):
    (sent,) = trace.sent()
    assert (sent.name, sent.times, sent.num_bytes) == ("gradient sum of conv1", 1.0, 500.5)
    assert sent.in_flight_s == pytest.approx(0.005, abs=1e-8)


def test_covered_time_is_what_a_grid_counts():
    draw = random.Random(1)
    for _ in range(50):
        spans = []
        for _ in range(draw.randrange(6)):
            begin = draw.randrange(100)
            spans.append(TracedSpan("", "compute", begin, begin + draw.randrange(40), None))
        step = TracedSpan("", "step", 20, 90, None)
        counted = sum(any(s.begin_s <= x < s.end_s for s in spans) for x in range(20, 90))
        assert covered(spans, step) == counted
