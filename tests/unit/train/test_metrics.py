import json
import os
import resource
import sys

import numpy as np
import pytest

from hpcnn.errors import ConfigError, DataError
from hpcnn.train import metrics
from hpcnn.train.metrics import MetricsWriter, read, summarise


def write_steps(writer, first, last):
    for step in range(first, last + 1):
        writer.write("step", step, loss=1.0 / step)


def steps(folder):
    return [record["step"] for record in read(folder / "metrics.jsonl") if record["event"] == "step"]


def test_every_record_is_one_json_line_and_there_at_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        returned = writer.write("step", 3, loss=np.float32(0.5), accuracy=0.25, bytes_sent=np.int64(12))
        writer.write("epoch", 3, epoch=1, loss=float("nan"), test_loss=float("inf"))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"event": "step", "step": 3, "loss": 0.5, "accuracy": 0.25, "bytes_sent": 12}
    assert returned == expected
    assert json.loads(lines[0]) == expected
    assert json.loads(lines[1]) == {"event": "epoch", "step": 3, "epoch": 1, "loss": None, "test_loss": None}
    assert len(lines) == 2


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, 1, 8)
        writer.write("epoch", 8, epoch=1)
        writer.write("end", 8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # killed in the middle of a line
    with MetricsWriter(tmp_path, resumed_step=5) as writer:
        write_steps(writer, 6, 9)
    assert steps(tmp_path) == list(range(1, 10))
    assert [record["event"] for record in read(tmp_path / "metrics.jsonl")] == ["step"] * 9
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_epochs_up_to_the_checkpoint_stay(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, 1, 4)
        writer.write("epoch", 4, epoch=1)
        write_steps(writer, 5, 6)
        writer.write("end", 6, stopped="SIGUSR1")
    with MetricsWriter(tmp_path, resumed_step=6) as writer:
        write_steps(writer, 7, 7)
    events = [(record["event"], record["step"]) for record in read(tmp_path / "metrics.jsonl")]
    assert events == [*[("step", n) for n in range(1, 5)], ("epoch", 4), *[("step", n) for n in (5, 6, 7)]]


def test_a_run_that_begins_anew_begins_with_an_empty_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, 1, 3)
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, 1, 1)
    assert steps(tmp_path) == [1]


def test_truncation_that_fails_keeps_the_whole_file(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, 1, 3)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match=r"metrics: cannot write '.*metrics.jsonl': No space left"):
        MetricsWriter(tmp_path, resumed_step=1)
    assert steps(tmp_path) == [1, 2, 3]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(DataError, match=r"cannot read '.*metrics.jsonl'"):
        read(tmp_path / "metrics.jsonl")


def test_the_summary_is_of_the_second_half():
    def record(step_s, images_per_second):
        return {
            "event": "step",
            "step": 1,
            "step_s": step_s,
            "images_per_second": images_per_second,
            "compute_s": 0.5 * step_s,
            "exposed_comm_s": 0.125 * step_s,
            "hidden_comm_s": 0.375 * step_s,
            "input_wait_s": 0.25 * step_s,
            "bytes_sent": 1000,
            "messages_sent": 3,
        }

    records = [
        record(100.0, 1.0),
        record(100.0, 1.0),
        {"event": "epoch", "step": 2},
        record(1.0, 60.0),
        record(3.0, 20.0),
    ]
    summary = summarise(records)
    assert summary.num_steps == 2
    assert summary.images_per_second == pytest.approx((60 + 60) / 4)
    assert summary.step_s == pytest.approx(2.0)
    assert (summary.compute_share, summary.exposed_comm_share) == pytest.approx((0.5, 0.125))
    assert (summary.input_wait_share, summary.other_share) == pytest.approx((0.25, 0.125))
    assert summary.hidden_comm_share == pytest.approx(0.75)
    assert (summary.bytes_per_step, summary.messages_per_step) == (1000, 3)


@pytest.mark.parametrize(
    ("exposed_s", "hidden_s", "expected"), [(0.0, 0.0, None), (0.5, None, 0.0), (0.0, 0.5, 1.0), (0.3, 0.1, 0.25)]
)
def test_hidden_communication_is_a_part_of_all_communication(exposed_s, hidden_s, expected):
    record = {"event": "step", "step": 1, "step_s": 1.0, "exposed_comm_s": exposed_s, "hidden_comm_s": hidden_s}
    assert summarise([record]).hidden_comm_share == (None if expected is None else pytest.approx(expected))


def test_there_is_no_summary_of_no_steps():
    assert summarise([{"event": "end", "step": 0}]) is None


def test_tensorboard_events_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write("step", 1, loss=0.5)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"step/loss" in events.read_bytes()


def test_tensorboard_that_is_not_installed_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'hpcnn\[tensorboard\]'"):
        MetricsWriter(tmp_path, tensorboard=True)
    assert metrics.FILE not in os.listdir(tmp_path)


@pytest.mark.parametrize("handled", [False, True])
def test_what_does_not_fit_on_the_disk_is_taken_back_and_later_records_are_whole(tmp_path, handled):
    lost = []
    writer = MetricsWriter(tmp_path, on_error=lost.append if handled else None)
    writer.write("step", 1, loss=0.5)
    size, (_, hard) = writer.path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, hard))  # of the next record nine bytes fit
    try:
        if handled:
            writer.write("step", 2, loss=0.25)
            assert "cannot write" in str(lost[0])
        else:
            with pytest.raises(DataError, match="cannot write"):
                writer.write("step", 2, loss=0.25)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert writer.path.stat().st_size == size
    writer.write("step", 3, loss=0.125)
    writer.close()
    assert [1, 3] == [json.loads(line)["step"] for line in writer.path.read_text().splitlines()]


def test_a_run_that_goes_back_forgets_later_records(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write("step", step)
        writer.rewind(3)
        writer.write("rollback", 3, from_step=5)
        writer.write("step", 4)
    assert [1, 2, 3, 3, 4] == [record["step"] for record in read(writer.path)]
