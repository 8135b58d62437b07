"""`hpcnn scale` as a process: real jobs of one and two ranks, one of them killed, and batch jobs without Slurm."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcnn.analysis.scaling_point import POINTS
from tests.launch import command, environment, reason_to_skip

needs_mpi = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

TINY = """
[data]
source = "synthetic"
image_shape = [28, 28, 1]
num_samples = 64

[train]
global_batch = 8
"""
LAUNCHER = shlex.join(command(0)).replace(" 0", " {ranks}", 1)
SERIAL, SPLIT = "strong-data-allreduce-auto-1-1", "strong-data-allreduce-ring-2-1"


def scale(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `hpcnn scale` in a folder, on one core a rank."""
    return subprocess.run(
        [sys.executable, "-m", "hpcnn", "scale", *words],
        capture_output=True, text=True, timeout=100, check=False, cwd=folder,
        env=environment({"OMP_NUM_THREADS": "1", **variables}),
    )  # fmt: skip


def table(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a study's table."""
    with (folder / "scaling.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@needs_mpi
def test_two_numbers_of_ranks_are_measured_once_and_a_killed_run_again(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    words = ["tiny.toml", "--ranks", "1,2", "--algorithms", "ring", "--repeats", "1", "--steps", "5", "--out", "s"]
    words += ["--launcher", LAUNCHER]
    done = scale(tmp_path, *words)
    assert (0, "") == (done.returncode, done.stderr)
    serial, split = table(tmp_path / "s")
    assert ("1", "finished", "2", "finished") == (serial["ranks"], serial["status"], split["ranks"], split["status"])
    # Gradients of 61,706 parameters by a ring of two: half of them there, the sums of the other half back.
    assert pytest.approx(4 * 61_706, rel=0.01) == float(split["bytes_sent"])
    assert 0.0 < float(split["step_s"]) < 5.0
    assert 30e6 < float(split["memory_bytes"]) < 1e9
    assert f"[2/2] {SPLIT}: " in done.stdout
    assert "Speed-up is over data, allreduce, auto on 1 rank" in done.stdout
    home = tmp_path / "s" / POINTS
    assert [] == list(home.rglob("*.h5"))

    kept = (home / SERIAL / "metrics.jsonl").stat().st_mtime_ns
    lines = (home / SPLIT / "metrics.jsonl").read_text().splitlines()
    (home / SPLIT / "metrics.jsonl").write_text("\n".join(lines[:3]))  # as a killed job leaves it
    again = scale(tmp_path, *words)
    assert 0 == again.returncode
    assert (SERIAL in again.stdout, SPLIT in again.stdout) == (False, True)
    assert kept == (home / SERIAL / "metrics.jsonl").stat().st_mtime_ns
    assert "end" == json.loads((home / SPLIT / "metrics.jsonl").read_text().splitlines()[-1])["event"]


@needs_mpi
def test_a_study_that_is_interrupted_ends_its_job_and_can_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    words = ["tiny.toml", "--ranks", "2", "--repeats", "1", "--steps", "100000", "--out", "s", "--launcher", LAUNCHER]
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcnn", "scale", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    metrics = tmp_path / "s" / POINTS / "strong-data-allreduce-auto-2-1" / "metrics.jsonl"
    give_up = time.monotonic() + 40
    while not (metrics.exists() and metrics.stat().st_size > 0) and time.monotonic() < give_up:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # what a batch system sends; Ctrl-C takes the same way
    stdout, stderr = process.communicate(timeout=40)
    assert (130, "") == (process.returncode, stderr)
    assert "interrupted; the same command goes on" in stdout
    size = metrics.stat().st_size
    assert "1 pending, 0 running" in scale(tmp_path, "s").stdout
    assert size == metrics.stat().st_size  # nobody writes it any more


@needs_mpi
def test_batch_jobs_run_the_points_of_one_array(tmp_path: Path) -> None:
    """Slurm is played by two scripts: sbatch runs the tasks at once, srun is the MPI library's own launcher."""
    (tmp_path / "tiny.toml").write_text(TINY)
    tools = tmp_path / "bin"
    tools.mkdir()
    srun = command(0)
    (tools / "srun").write_text(
        f'#!/bin/bash\nn=${{1#--ntasks=}}; echo "$@" >> {tmp_path}/srun.log; shift 3\n'
        f'exec {shlex.join(srun).replace(" 0", " $n", 1)} "$@"\n'
    )
    (tools / "sbatch").write_text(
        "#!/bin/bash\nlast=$(sed -n 's/.*--array=0-//p' \"$2\")\nfor task in $(seq 0 $last); do\n"
        f'SLURM_ARRAY_TASK_ID=$task bash "$2" >> {tmp_path}/tasks.log 2>&1 || true\ndone\necho 41\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o700)
    words = ["tiny.toml", "--ranks", "1,2", "--algorithms", "ring", "--repeats", "1", "--steps", "4", "--out", "s"]
    words += ["--launcher", "sbatch", "--launcher-args=--mpi=none", "--sbatch-args=--time=5"]
    done = scale(tmp_path, *words, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert (0, "") == (done.returncode, done.stderr)
    assert f"submitted 2 runs as job 41; `hpcnn scale {tmp_path}/s` shows" in done.stdout
    assert "#SBATCH --ntasks=2" in (tmp_path / "s" / "scale.sbatch").read_text()
    calls = (tmp_path / "srun.log").read_text().splitlines()
    assert [f"--ntasks={n} --kill-on-bad-exit=1 --mpi=none" for n in (1, 2)] == [
        " ".join(line.split()[:3]) for line in calls
    ]
    shown = scale(tmp_path, "s")
    assert (0, "") == (shown.returncode, shown.stderr)
    assert ["finished", "finished"] == [row["status"] for row in table(tmp_path / "s")]
    assert f"{SPLIT}: " in (tmp_path / "tasks.log").read_text()


def test_points_that_fail_are_told_with_their_reasons_and_the_others_are_tried(tmp_path: Path) -> None:
    broken = tmp_path / "launch"
    broken.write_text('#!/bin/sh\necho "hpcnn: error: comm: no route for $1."; exit 7\n')
    broken.chmod(0o700)
    words = ["lenet5", "--ranks", "2,3", "--repeats", "1", "--out", "s", "--launcher", f"{broken} {{ranks}}"]
    done = scale(tmp_path, *words)
    assert (1, "") == (done.returncode, done.stderr)
    for ranks in (2, 3):
        assert f"-{ranks}-1: failed: exit status 7: comm: no route for {ranks}.\n" in done.stdout
    assert ["failed", "failed"] == [row["status"] for row in table(tmp_path / "s")]


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["lenet5"], {}, "a configuration, which --ranks goes with"),
        (["lenet5", "--ranks", "1", "--point", "x"], {}, "which --point goes with"),
        (["."], {}, "holds no study"),
        ([".", "--point", "x"], {}, "is no point of a study"),
        ([".", "--ranks", "1"], {}, "'.' is a folder"),
        (["lenet5", "--ranks", "1", "--steps", "2"], {}, "--steps (=2) must be more than the 2"),
        (["lenet5", "--ranks", "1", "--limit", "0"], {}, "--limit (=0) must be more"),
        (["lenet5", "--ranks", "1", "--launcher", "mpiexec"], {}, "--launcher (='mpiexec')"),
        (["lenet5", "--ranks", "1", "--sbatch-args", "-N2 -p x"], {}, "--sbatch-args are for --launcher sbatch"),
        (["lenet5", "--ranks", "1"], {"PMI_SIZE": "2"}, "must not be started on several ranks"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(
    words: list[str], variables: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcnn.cli import main as cli
    from hpcnn.errors import HpcnnError

    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(HpcnnError) as caught:
            cli.main(["scale", *words])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert message in str(caught.value)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--ranks", "1,,2"], ["--ranks", "0"], ["--ranks", "1,two"], ["--plans", "data,"]])
def test_lists_are_words_with_commas(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from hpcnn.cli import main as cli

    with pytest.raises(SystemExit) as caught:
        cli.main(["scale", "lenet5", *words])
    assert 2 == caught.value.code
    assert "must be" in capsys.readouterr().err
