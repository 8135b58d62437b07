import io
import sys

import pytest

from hpcnn.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


VALUES = {"loss": 0.5, "accuracy": 0.25, "images_per_second": 99.6, "lr": 0.1}


def test_a_batch_log_has_the_first_and_last_step_and_one_line_an_interval():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, every_seconds=10.0, clock=clock)
    progress.start(100)
    for step in range(1, 101):
        clock.now += 1.0
        progress.step(step, **VALUES)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert lines[1] == "train 11/100  loss 0.5000  acc 0.2500  100 img/s  lr 0.1  0:01:29 left"
    assert lines[-1] == "train 100/100  loss 0.5000  acc 0.2500  100 img/s  lr 0.1"


def test_time_left_counts_only_the_steps_of_this_run():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)
    progress.start(1000, initial=900)
    clock.now += 36.0
    progress.step(901)
    assert stream.getvalue() == "train 901/1000  0:59:24 left\n"


def test_interval_zero_shows_every_step():
    stream = io.StringIO()
    progress = Progress(stream, every_seconds=0.0)
    progress.start(5)
    for step in range(1, 6):
        progress.step(step, **VALUES)
    assert len(stream.getvalue().splitlines()) == 5


def test_results_of_epochs_and_messages_go_to_their_own_streams():
    stream, results = io.StringIO(), io.StringIO()
    with Progress(stream, results) as progress:
        progress.epoch(2, loss=1.25, test_accuracy=0.75, test_loss=None)
        progress.message("checkpoint written")
    assert results.getvalue() == "epoch 2  loss 1.2500  test acc 0.7500\n"
    assert stream.getvalue() == "checkpoint written\n"


def test_one_count_follows_another_under_its_own_label():
    stream = io.StringIO()
    progress = Progress(stream)
    for label, total in (("train", 3), ("evaluate", 4)):
        progress.start(total, label=label)
        progress.step(1)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["train 1/3", "evaluate 1/4"]


def test_a_rank_without_streams_says_nothing(capsys):
    with Progress(None, None, every_seconds=0.0) as progress:
        progress.start(5)
        progress.step(1, **VALUES)
        progress.epoch(1)
        progress.message("text")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_with_the_values():
    pytest.importorskip("tqdm")
    stream, results = Terminal(), Terminal()
    with Progress(stream, results) as progress:
        progress.start(10, initial=4)
        for step in range(5, 11):
            progress.step(step, **VALUES)
        progress.message("checkpoint written")
        progress.epoch(1, test_accuracy=0.5)
    text = stream.getvalue()
    assert "10/10" in text
    assert "loss 0.5000" in text
    assert "100 img/s" in text
    assert "\rcheckpoint written\n" in text
    assert results.getvalue() == "epoch 1  test acc 0.5000\n"


def test_a_terminal_without_tqdm_has_plain_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    with Progress(stream) as progress:
        progress.start(10)
        progress.step(1, **VALUES)
    assert stream.getvalue().startswith("train 1/10  loss 0.5000")


def test_a_stream_that_takes_no_more_does_not_end_the_run():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    results = io.StringIO()
    with Progress(Full(), results, every_seconds=0.0) as progress:
        progress.start(2)
        progress.step(1, **VALUES)
        progress.epoch(1, **VALUES)
    assert "epoch 1" in results.getvalue()
