import pickle
import threading
import time

import pytest

from hpcnn.timeline import LANES, OFF, Span, Timeline


def names(timeline):
    return [span.name for span in timeline.spans]


def test_a_span_holds_its_block_and_what_was_said_of_it():
    timeline = Timeline()
    before = time.perf_counter()
    with timeline.span("conv1 forward", "compute", layer="conv1"):
        time.sleep(0.002)
    after = time.perf_counter()
    (span,) = timeline.spans
    assert ("conv1 forward", "compute", {"layer": "conv1"}) == (span.name, span.lane, span.args)
    assert before <= span.begin_s < span.end_s <= after
    assert span.end_s - span.begin_s >= 0.002


def test_a_span_inside_another_ends_first_and_lies_within_it():
    timeline = Timeline()
    with timeline.span("outer", "compute"), timeline.span("inner", "compute"):
        pass
    inner, outer = timeline.spans
    assert ("inner", "outer") == (inner.name, outer.name)
    assert outer.begin_s <= inner.begin_s <= inner.end_s <= outer.end_s


def test_a_block_that_raises_is_recorded_and_the_error_goes_on():
    timeline = Timeline()
    with pytest.raises(KeyError), timeline.span("failing", "wait"):
        raise KeyError("x")
    assert ["failing"] == names(timeline)


def test_spans_that_are_over_are_added_as_they_are():
    timeline = Timeline()
    timeline.add("bucket 3", "communication", 1.5, 2.25, bytes=4096, algorithm="ring")
    assert [Span("bucket 3", "communication", 1.5, 2.25, {"bytes": 4096, "algorithm": "ring"})] == timeline.spans


def test_off_records_nothing_whatever_is_called():
    with OFF.step(1), OFF.span("a", "compute", layer="x"):
        OFF.add("b", "communication", 0.0, 1.0)
    OFF.stop()
    OFF.add("c", "communication", 0.0, 1.0)
    assert ([], 0, False) == (OFF.spans, OFF.num_dropped, OFF.recording)


def test_recording_ends_with_the_last_step_that_is_wanted():
    timeline = Timeline(num_steps=2)
    with timeline.span("before the steps", "input"):
        pass
    for number in (7, 8, 9):
        with timeline.step(number), timeline.span(f"work {number}", "compute"):
            assert (number < 9) == timeline.recording
    assert ["before the steps", "work 7", "step 7", "work 8", "step 8"] == names(timeline)
    assert ["step"] * 2 == [span.lane for span in timeline.spans if span.name.startswith("step")]


def test_a_collective_that_outlives_the_last_step_is_kept_and_one_that_begins_later_is_not():
    timeline = Timeline(num_steps=1)
    with timeline.step(1):
        begin_s = time.perf_counter()
        crossing = timeline.span("crossing", "wait")
        crossing.__enter__()
    later_s = time.perf_counter()
    crossing.__exit__(None, None, None)
    timeline.add("late", "communication", later_s, later_s + 1.0)
    timeline.add("crossing too", "communication", begin_s, later_s + 1.0)
    assert ["step 1", "crossing", "crossing too"] == names(timeline)


def test_without_a_number_of_steps_all_are_recorded():
    timeline = Timeline()
    for number in range(50):
        with timeline.step(number):
            pass
    assert [f"step {number}" for number in range(50)] == names(timeline)


def test_spans_beyond_the_limit_are_counted_and_not_kept():
    timeline = Timeline(max_spans=3)
    for number in range(5):
        timeline.add(str(number), "compute", number, number + 1)
    with timeline.span("5", "compute"):
        pass
    assert (["0", "1", "2"], 3) == (names(timeline), timeline.num_dropped)


def test_threads_add_spans_without_losing_or_miscounting_any():
    timeline = Timeline(max_spans=6000)

    def work(thread):
        for number in range(2000):
            timeline.add(f"{thread}.{number}", "communication", 0.0, 1.0)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (6000, 2000) == (len(set(names(timeline))), timeline.num_dropped)


def test_the_spans_that_are_handed_out_are_a_copy():
    timeline = Timeline()
    timeline.add("a", "compute", 0.0, 1.0)
    timeline.spans.clear()
    assert ["a"] == names(timeline)


def test_spans_survive_the_way_to_another_process():
    span = Span("a", LANES[0], 0.25, 1.0, {"bytes": 3})
    assert span == pickle.loads(pickle.dumps(span))


def test_calls_that_record_nothing_cost_less_than_a_microsecond():
    def seconds_of(rounds):
        begin = time.perf_counter()
        for _ in range(rounds):
            with OFF.span("conv1 forward", "compute", layer="conv1"):
                pass
        return (time.perf_counter() - begin) / rounds

    assert min(seconds_of(1000) for _ in range(20)) < 1e-6


class Recorder:
    """Marks that are kept."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def push(self, name: str) -> None:
        self.calls.append(f"push {name}")

    def pop(self) -> None:
        self.calls.append("pop")

    def synchronise(self) -> None:
        self.calls.append("synchronise")


def test_marks_hear_of_every_span_and_the_device_is_waited_for_in_recorded_computation_only() -> None:
    timeline = Timeline(num_steps=1)
    timeline.marks = marks = Recorder()
    for number in range(2):
        with timeline.step(number), timeline.span("conv", "compute"), timeline.span("wait", "wait"):
            pass
    recorded = ["push step 0", "push conv", "push wait", "pop", "synchronise", "pop", "pop"]
    marked = ["push step 1", "push conv", "push wait", "pop", "pop", "pop"]
    assert marks.calls == recorded + marked
    assert [span.name for span in timeline.spans] == ["wait", "conv", "step 0"]
