"""Run folders as they lie around: half written, damaged, from other versions, written by somebody hostile."""

from __future__ import annotations

import json

import pytest

from hpcnn.errors import DataError
from hpcnn.report.run import read_run
from hpcnn.report.untrusted import clean, cleaned, is_number


def test_a_finished_run_is_read_without_a_note(make_run):
    run = read_run(make_run())
    assert run.notes == []
    assert [step["step"] for step in run.steps] == list(range(1, 9))
    assert run.end is not None
    assert run.end["stopped"] == ""
    assert run.num_ranks == 2
    assert run.fact("data", "num_classes") == 10
    assert run.fact("data", "nothing", "below") is None
    assert run.trace is not None


def test_a_run_that_goes_on_is_read_up_to_its_half_written_line(make_run):
    run = read_run(make_run(ended=False, extra='{"event": "step", "st'))
    assert len(run.steps) == 8
    assert any("1 line cannot be read" in note for note in run.notes)
    assert any("has not ended" in note and "step 8" in note for note in run.notes)


def test_bytes_that_are_no_text_are_left_out(make_run):
    folder = make_run(ended=False)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x00\n[1, 2]\nnull\n")
    run = read_run(folder)
    assert len(run.steps) == 8
    assert any("3 lines cannot be read" in note for note in run.notes)


def test_an_empty_run_says_so(make_run):
    run = read_run(make_run(records=[], ended=False, traced=False))
    assert run.summary is None
    assert any("no step yet" in note for note in run.notes)


@pytest.mark.parametrize("value", ["x", None, [1], {"a": 1}, True, float("nan"), float("inf"), 10**400])
def test_a_field_that_is_no_number_is_left_out(make_run, value):
    record = {"event": "step", "step": 1, "loss": value, "step_s": value, "exposed_comm_s": value}
    run = read_run(make_run(records=[record], ended=False))
    assert run.steps == [{"event": "step", "step": 1, "stopped": ""}]
    assert run.summary is None


@pytest.mark.parametrize("name", ["config.toml", "plan.toml", "environment.json"])
def test_each_missing_file_is_named(make_run, name):
    folder = make_run()
    (folder / name).unlink()
    assert [note for note in read_run(folder).notes if name in note]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.toml", "[model"),
        ("config.toml", "[model]\nfrom_the_future = 1"),
        ("environment.json", "[1]"),
        ("environment.json", "[" * 100_000),
        ("trace.json", '{"traceEvents": [\n{"ph": "X"'),
        ("trace.json", '{"traceEvents": 3}'),
        ("trace.json", '{"traceEvents": [{"ph": "X", "pid": [], "cat": "step"}, 7]}'),
    ],
)
def test_each_damaged_file_is_named(make_run, name, text):
    folder = make_run()
    (folder / name).write_text(text)
    assert [note for note in read_run(folder).notes if name in note]


def test_a_folder_that_is_none_or_holds_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no metrics\.jsonl and no scaling\.csv"):
        read_run(tmp_path)


def test_texts_are_fit_for_a_page():
    assert clean("a\x00b\x1bc\ud800d\te") == "a�b�c�d e"
    assert len(clean("x" * 10_000)) < 3000
    assert cleaned(json.loads('{"a\\u0000": ["\\ud800", 1, null]}')) == {"a�": ["�", 1, None]}
    assert [is_number(value) for value in (1, 1.5, True, "1", None)] == [True, True, False, False, False]
