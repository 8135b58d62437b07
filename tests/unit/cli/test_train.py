"""`hpcnn train` and `evaluate` from the outside: what a batch job sees, and how bad input ends it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.launch import Result, launch, reason_to_skip, start_job

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

TINY = ("--set", "train.steps=4", "--set", "train.global_batch=12", "--set", "log.every_seconds=0")


def hpcnn(folder: Path, *args: str, n: int = 2, **options) -> Result:
    return launch(n, "hpcnn", args, cwd=folder, timeout=60, **options)


def train(folder: Path, *args: str, n: int = 2, **options) -> Result:
    return hpcnn(folder, "train", "lenet5", *TINY, "--out", "run", *args, n=n, **options)


def image_file(path: Path, num_images: int = 24, classes: int = 3, **changes: np.ndarray) -> Path:
    draw = np.random.default_rng(0)
    tensors = {
        "images": draw.integers(0, 256, (num_images, 28, 28, 1), np.uint8),
        "labels": draw.integers(0, classes, num_images),
    } | changes
    with h5py.File(path, "w") as file:
        file.attrs["class_names"] = [f"c{index}" for index in range(classes)]
        for name, tensor in tensors.items():
            file.create_dataset(name, data=tensor)
    return path


def assert_refused(result: Result, *words: str, code: int | None = None) -> None:
    """One line, a non-zero code, no traceback, and soon."""
    assert result.returncode != 0
    assert code in (None, result.returncode)
    assert len(result.errors) == 1, result.stderr
    for word in words:
        assert word in result.errors[0]
    assert "Traceback" not in result.stderr
    assert result.seconds < 30


def test_a_batch_log_has_plain_lines_once_and_ends_with_the_accuracy(tmp_path: Path) -> None:
    result = train(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stderr
    assert [f"train {step}/4" in result.stderr for step in (1, 2, 3, 4)] == [True] * 4
    assert result.stderr.count("train 2/4") == 1
    assert result.stdout.count("test accuracy") == 1
    score = hpcnn(tmp_path, "evaluate", "run", "--json", n=3)
    kept = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(score.stdout)["accuracy"] == pytest.approx(kept["test_accuracy"])


def test_yolo_trains_and_is_evaluated_without_batch_norm_where_that_is_asked_for(tmp_path: Path) -> None:
    small = ("data.image_shape=[32, 32, 3]", "data.num_samples=16", "data.num_classes=3", "model.batchnorm=false")
    sets = [word for setting in small for word in ("--set", setting)]
    result = hpcnn(tmp_path, "train", "yolo16", *TINY, *sets, "--out", "run", n=1)
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "run" / "final.h5") as file:
        assert {"weight", "bias"} == set(file["parameters/conv1"])
        assert not any(name.startswith("norm") for name in file["parameters"])
    assert hpcnn(tmp_path, "evaluate", "run", n=1).returncode == 0
    assert_refused(train(tmp_path, "--set", "model.batchnorm=false"), "'lenet5' has no other form", code=2)


def test_an_unknown_key_is_one_line_on_any_number_of_ranks(tmp_path: Path) -> None:
    assert_refused(train(tmp_path, "--set", "train.learning_rate=1"), "Did you mean 'train.lr'?", code=2)


def test_a_batch_smaller_than_the_ranks_is_refused(tmp_path: Path) -> None:
    assert_refused(train(tmp_path, "--set", "train.global_batch=1"), "(=1)", "ranks (=2)")


def test_labels_out_of_range_are_refused_with_the_place_of_the_first(tmp_path: Path) -> None:
    labels = np.zeros(24, np.int64)
    labels[17] = 3
    path = image_file(tmp_path / "bad.h5", labels=labels)
    assert_refused(train(tmp_path, "--set", f"data.source={path}"), "image 17 (=3)", "classes (=3)")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = image_file(tmp_path / "cut.h5")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert_refused(train(tmp_path, "--set", f"data.source={path}"), "cut.h5", "truncated")


def test_a_file_that_is_no_image_set_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    assert_refused(train(tmp_path, "--set", f"data.source={text}"), "text.h5")
    path = image_file(tmp_path / "float.h5", images=np.zeros((24, 28, 28, 1), np.float32))
    assert_refused(train(tmp_path, "--set", f"data.source={path}"), "must be uint8 (N, H, W, C)")


def test_a_file_that_only_one_rank_lacks_ends_all_of_them(tmp_path: Path) -> None:
    image_file(tmp_path / "set.h5")
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys\n"
        "from hpcnn.comm import start\n"
        "if start().rank == 1: os.chdir('/')\n"
        "from hpcnn.cli.main import entry\n"
        "entry()\n"
    )
    args = ("train", "lenet5", *TINY, "--out", str(tmp_path / "run"), "--set", "data.source=set.h5")
    result = launch(3, script, args, cwd=tmp_path, timeout=60)
    assert_refused(result, "'set.h5' does not exist", "(on rank 1)")


def test_a_loss_that_is_no_number_is_one_line_and_spares_the_checkpoint(tmp_path: Path) -> None:
    args = ("--set", "train.lr=1e30", "--set", "train.warmup_epochs=0", "--set", "checkpoint.every_steps=1")
    assert_refused(train(tmp_path, *args, "--set", "train.steps=40"), "must be a finite number", "train.lr")
    assert hpcnn(tmp_path, "evaluate", "run").returncode == 0


def test_an_exception_on_one_rank_ends_the_job_at_once(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "from hpcnn.comm import start\n"
        "from hpcnn.parallel import program\n"
        "from hpcnn.cli.main import entry\n"
        "if start().rank == 1:\n"
        "    def broken(*args): raise RuntimeError('boom')\n"
        "    program.Program.train_step = broken\n"
        "entry()\n"
    )
    result = launch(3, script, ("train", "lenet5", *TINY, "--out", "run"), cwd=tmp_path, timeout=60)
    assert result.returncode != 0
    assert result.errors == ["hpcnn: error on rank 1: RuntimeError: boom"]
    assert result.seconds < 30


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_spares_the_one_before(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import resource\n"
        "from hpcnn.comm import start\n"
        "from hpcnn.train import checkpoint\n"
        "from hpcnn.cli.main import entry\n"
        "save = checkpoint.Store.save\n"
        "def limited(store, snapshot, **names):\n"
        "    if snapshot.step == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "    return save(store, snapshot, **names)\n"
        "checkpoint.Store.save = limited\n"
        "entry()\n"
    )
    args = ("train", "lenet5", *TINY, "--out", "run", "--set", "checkpoint.every_steps=1")
    result = launch(2, script, args, cwd=tmp_path, timeout=60)
    assert_refused(result, "cannot write", "step-00000003.h5", "Earlier checkpoints are intact")
    assert hpcnn(tmp_path, "evaluate", "run").returncode == 0
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_checkpoint_of_another_model_is_refused_by_both_names(tmp_path: Path) -> None:
    assert train(tmp_path).returncode == 0
    args = ("train", "resnet20", *TINY, "--out", "other", "--init", "run/final.h5", "--set", "data.num_samples=64")
    assert_refused(hpcnn(tmp_path, *args), "is of 'lenet5'", "model is 'resnet20'")


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    args = ("--set", "checkpoint.every_steps=2")
    assert train(tmp_path, *args).returncode == 0
    for name in ("final.h5", "best.h5"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004.h5"
    newest.write_bytes(newest.read_bytes()[:-5000])
    result = train(tmp_path, *args, "--resume", n=3)
    assert result.returncode == 0, result.stderr
    assert "warning" in result.stderr
    assert "step-00000002.h5" in result.stderr


def test_a_run_folder_is_never_written_over(tmp_path: Path) -> None:
    assert train(tmp_path).returncode == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert_refused(train(tmp_path), "holds a run already", code=2)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_asked_to_stop_writes_a_checkpoint_exits_with_75_and_goes_on_on_other_ranks(tmp_path: Path) -> None:
    args = ("train", "lenet5", "--out", "run", "--set", "train.steps=100000", "--set", "log.every_seconds=0")
    job = start_job(2, "hpcnn", args, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 40
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=40)
    assert job.returncode == 75, err
    assert "stopped by" in out
    stopped = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    again = hpcnn(tmp_path, "train", "--resume", "--out", "run", "--set", f"train.steps={stopped + 2}", n=3)
    assert again.returncode == 0, again.stderr
    steps = [r["step"] for r in map(json.loads, metrics.read_text().splitlines()) if r["event"] == "step"]
    assert steps == list(range(1, stopped + 3))


def test_plan_prints_every_layer_and_needs_no_mpi(tmp_path: Path) -> None:
    result = launch(1, "hpcnn", ("plan", "vgg16", "--ranks", "5", "--save", "plan.toml"), cwd=tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "138 M parameters" in result.stdout
    assert "fc6" in result.stdout or "fc1" in result.stdout
    assert (tmp_path / "plan.toml").exists()


def test_a_plan_with_turns_is_printed_saved_and_trained(tmp_path: Path) -> None:
    planned = hpcnn(tmp_path, "plan", "lenet5", "--ranks", "2", "--set", "plan.turns=[2, 3]", "--save", "plan.toml")
    assert planned.returncode == 0, planned.stderr
    assert "conv1 to pool1 in 2 x 3 turns: at most" in planned.stdout
    assert "turns = [2, 3]" in (tmp_path / "plan.toml").read_text()
    run = ("--set", "train.steps=3")
    trained = hpcnn(tmp_path, "train", "lenet5", "--plan", "plan.toml", "--out", "run", *run, n=2)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "plan.toml").read_text() == (tmp_path / "plan.toml").read_text()


SLOW_WRITE = """
import sys, time
from hpcnn.train import checkpoint
write = checkpoint.write
def slow(path, snapshot):
    write(path, snapshot)
    if snapshot.step == 6:
        print("half way", flush=True)
        path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
        path.unlink()
        time.sleep(60)
checkpoint.write = slow
from hpcnn.cli.main import entry
entry()
"""


def test_a_second_request_leaves_at_once_and_the_next_start_clears_what_was_half_written(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SLOW_WRITE)
    sets = ("train.steps=9", "train.global_batch=12", "checkpoint.every_steps=3", "checkpoint.every_epochs=0")
    args = ("train", "lenet5", "--out", "run", *(word for one in sets for word in ("--set", one)))
    job = start_job(2, script, args, cwd=tmp_path)
    assert job.stdout is not None
    assert "half way" in iter(job.stdout.readline, "").__next__()
    begin = time.monotonic()
    job.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=20)
    assert job.returncode not in (0, 75), err
    assert time.monotonic() - begin < 10
    folder = tmp_path / "run" / "checkpoints"
    assert [".step-00000006.h5.1.tmp", "step-00000003.h5"] == sorted(path.name for path in folder.iterdir())
    again = hpcnn(tmp_path, *args, "--resume")
    assert again.returncode == 0, again.stderr
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_signal_while_a_run_is_set_up_stops_it_after_its_first_step(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os, signal, sys\n"
        "sys.argv[1:1] = ['train']\n"
        "from hpcnn.comm import start\n"
        "from hpcnn.train import setup\n"
        "from hpcnn.cli import train\n"
        "def assemble(*args):\n"
        "    if start().rank == 1: os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return setup.assemble(*args)\n"
        "train.assemble = assemble\n"
        "from hpcnn.cli.main import entry\n"
        "entry()\n"
    )
    result = launch(2, script, ("lenet5", *TINY, "--out", "run"), cwd=tmp_path, timeout=60)
    assert result.returncode == 75, result.stderr
    assert "after step 1;" in result.stdout
    assert (tmp_path / "run" / "checkpoints" / "step-00000001.h5").exists()


def test_a_full_disk_may_be_told_once_and_passed_over_but_not_at_the_end(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import resource\n"
        "from hpcnn.comm import start\n"
        "start()\n"  # MPI's own memory is files too
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from hpcnn.cli.main import entry\n"
        "entry()\n"
    )
    args = ("train", "lenet5", *TINY, "--out", "run", "--set", "checkpoint.every_steps=1")
    result = launch(2, script, (*args, "--set", "checkpoint.on_error=continue"), cwd=tmp_path, timeout=60)
    assert_refused(result, "cannot write", "step-00000004.h5")
    assert 1 == result.stderr.count("Training goes on without it")
    assert not list((tmp_path / "run").rglob("*.tmp"))
