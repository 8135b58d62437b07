"""The trace file, read back with nothing but the rules of its format."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcnn.errors import ConfigError
from hpcnn.report import trace
from hpcnn.report.trace import RankSpans
from hpcnn.timeline import Span


def rank_of(*spans, hostname="node1", offset_s=0.0, num_dropped=0):
    return RankSpans(hostname, offset_s, [Span(*span, {}) for span in spans], num_dropped)


def written(tmp_path, *ranks):
    trace.write(tmp_path / "trace.json", ranks)
    return json.loads((tmp_path / "trace.json").read_text())


def complete(content):
    return [event for event in content["traceEvents"] if event["ph"] == "X"]


def named(content, kind):
    return [event for event in content["traceEvents"] if event["name"] == kind]


def threads(content):
    """Return the spans of every thread, as (begin, end, name) in the order of the file, by process and name."""
    thread_names = {(e["pid"], e["tid"]): e["args"]["name"] for e in named(content, "thread_name")}
    assert len(thread_names) == len(named(content, "thread_name"))
    found = {(pid, name): [] for (pid, _), name in thread_names.items()}
    assert len(found) == len(thread_names)
    for event in complete(content):
        key = (event["pid"], thread_names[event["pid"], event["tid"]])
        found[key].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    return found


def in_nanoseconds(spans):
    return [(round(1e3 * begin), round(1e3 * end)) for begin, end, _ in spans]


def assert_disjoint(spans):
    for (_, end), (begin, _) in pairwise(sorted(in_nanoseconds(spans))):
        assert end <= begin


def assert_nested(spans):
    """Replay a thread as a viewer does: every span ends before the one that is open around it."""
    open_ends = []
    for begin, end in in_nanoseconds(spans):
        while open_ends and open_ends[-1] <= begin:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1]
        open_ends.append(end)


def test_every_rank_is_a_process_with_its_host_even_one_without_spans(tmp_path):
    content = written(tmp_path, rank_of(("a", "compute", 1.0, 2.0)), rank_of(hostname="node2"))
    assert {1: "rank 0 (node1)", 2: "rank 1 (node2)"} == {
        event["pid"]: event["args"]["name"] for event in named(content, "process_name")
    }
    assert {"ranks": 2, "dropped_spans": 0} == content["otherData"]


def test_clocks_are_laid_over_each_other_and_time_begins_at_zero(tmp_path):
    # Both ranks start at the same moment; rank 1's node was switched on 90 s later, and it works half as long.
    first = rank_of(("a", "compute", 100.0, 100.5))
    second = rank_of(("b", "compute", 10.0, 10.25), ("c", "wait", 10.125, 10.25), offset_s=90.0)
    content = written(tmp_path, first, second)
    times = {event["name"]: (event["pid"], event["ts"], event["dur"]) for event in complete(content)}
    assert {"a": (1, 0.0, 5e5), "b": (2, 0.0, 2.5e5), "c": (2, 1.25e5, 1.25e5)} == times


def test_each_lane_is_a_thread_of_its_own_in_a_fixed_order(tmp_path):
    lanes = ["communication", "input", "wait", "compute", "step"]
    content = written(tmp_path, rank_of(*[(lane, lane, 0.0, 1.0) for lane in lanes]))
    order = [(event["args"]["sort_index"], event["tid"]) for event in named(content, "thread_sort_index")]
    names = {event["tid"]: event["args"]["name"] for event in named(content, "thread_name")}
    assert ["step", "compute", "wait", "communication", "input"] == [names[thread] for _, thread in sorted(order)]
    assert all(event["name"] == event["cat"] == names[event["tid"]] for event in complete(content))


def test_no_number_is_zero_or_used_twice(tmp_path):
    ranks = [rank_of(("a", "compute", 0.0, 1.0), ("b", "communication", 0.0, 1.0)) for _ in range(3)]
    content = written(tmp_path, *ranks)
    processes = [event["pid"] for event in named(content, "process_name")]
    tids = [event["tid"] for event in named(content, "thread_name")]
    assert len(set(processes + tids)) == 3 + 6
    assert min(processes + tids) > 0


def test_collectives_in_flight_together_lie_side_by_side(tmp_path):
    spans = [("a", 0.0, 3.0), ("b", 1.0, 2.0), ("c", 1.5, 4.0), ("d", 2.5, 5.0), ("e", 5.0, 6.0)]
    content = written(tmp_path, rank_of(*[(name, "communication", begin, end) for name, begin, end in spans]))
    rows = {name: [span[2] for span in row] for (_, name), row in threads(content).items()}
    assert {"communication": ["a", "e"], "communication 2": ["b", "d"], "communication 3": ["c"]} == rows


def test_a_layer_inside_a_pass_shares_its_thread_and_comes_after_it(tmp_path):
    spans = [("conv1", 0.0, 1.0), ("conv2", 1.0, 3.0), ("forward", 0.0, 3.0), ("next", 3.0, 3.0)]
    content = written(tmp_path, rank_of(*[(name, "compute", begin, end) for name, begin, end in spans]))
    ((_, row),) = threads(content).items()
    assert ["forward", "conv1", "conv2", "next"] == [span[2] for span in row]
    assert_nested(row)


times = st.tuples(st.floats(0, 1e-3), st.floats(0, 1e-3)).map(sorted)


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["compute", "communication", "input"]), times), max_size=30), max_size=3
    ),
    st.floats(-1e5, 1e5),  # on one clock: the length of the trace
)
def test_threads_of_any_spans_keep_the_format(spans_of_ranks, offset_s):
    ranks = [
        rank_of(*[(str(n), lane, *span) for n, (lane, span) in enumerate(spans)], offset_s=offset_s * index)
        for index, spans in enumerate(spans_of_ranks)
    ]
    content = {"traceEvents": list(trace.events(ranks))}
    assert sum(map(len, spans_of_ranks)) == len(complete(content))
    for (pid, name), row in threads(content).items():
        assert row == sorted(row, key=lambda span: span[0])
        assert row[0][0] >= 0.0
        if name.startswith("communication"):
            assert_disjoint(row)
            most = _most_at_once([s for lane, s in spans_of_ranks[pid - 1] if lane == "communication"])
            assert int(name.partition(" ")[2] or 1) <= most
        else:
            assert_nested(row)


def _most_at_once(spans):
    """Return how many spans touch one moment at most; those that merely meet count, for rounding may make them."""
    return max(sum(begin - 1e-8 <= at <= end + 1e-8 for begin, end in spans) for at, _ in spans)


def test_neighbours_far_from_zero_do_not_overlap_by_rounding(tmp_path):
    moments = 3e6 + np.cumsum(np.random.default_rng(1).uniform(1e-7, 1e-5, 2000))
    spans = [(str(n), "communication", float(begin), float(end)) for n, (begin, end) in enumerate(pairwise(moments))]
    content = written(tmp_path, rank_of(*spans))
    ((_, row),) = threads(content).items()
    assert_disjoint(row)
    assert 2e3 < row[-1][1] < 2e4


def test_what_is_said_of_a_span_reads_back(tmp_path):
    args = {"layer": "conv1", "bytes": np.int64(4096), "algorithm": "ring", "share": np.float32(0.5), "axis": {1}}
    content = written(tmp_path, RankSpans("node1", 0.0, [Span('"ä\\', "communication", 0.0, 1.0, args)], 0))
    (event,) = complete(content)
    assert '"ä\\' == event["name"]
    assert {"layer": "conv1", "bytes": 4096, "algorithm": "ring", "share": 0.5, "axis": "{1}"} == event["args"]


def test_dropped_spans_are_told(tmp_path):
    content = written(tmp_path, rank_of(), rank_of(("a", "compute", 0.0, 1.0), num_dropped=12))
    assert [(2, "12 spans dropped")] == [(e["pid"], e["args"]["labels"]) for e in named(content, "process_labels")]
    assert content["otherData"]["dropped_spans"] == 12


def test_a_trace_replaces_an_older_one_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "new" / "folder"
    for name in ("a", "b"):
        trace.write(folder / "trace.json", [rank_of((name, "compute", 0.0, 1.0))])
    assert ["trace.json"] == os.listdir(folder)
    assert ["b"] == [event["name"] for event in complete(json.loads((folder / "trace.json").read_text()))]


def test_a_trace_that_fails_half_way_leaves_the_older_one(tmp_path, monkeypatch):
    trace.write(tmp_path / "trace.json", [rank_of(("a", "compute", 0.0, 1.0))])
    before = (tmp_path / "trace.json").read_text()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match=r"trace: cannot write '.*trace.json': No space left on device;"):
        trace.write(tmp_path / "trace.json", [rank_of(("b", "compute", 0.0, 1.0))])
    assert before == (tmp_path / "trace.json").read_text()
    assert ["trace.json"] == os.listdir(tmp_path)


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"trace: cannot write '.*file/trace.json'"):
        trace.write(tmp_path / "file" / "trace.json", [rank_of()])
