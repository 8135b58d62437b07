"""The job scripts in slurm/, run by a real Slurm of two pretended nodes: what trains, stops, comes back and fails.

It needs root, MPICH, and `scripts/virtual_slurm.py install`; jobs wait for each other, longer than a usual test may.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.launch import ROOT, launch, launcher_version

sys.path.insert(0, str(ROOT / "scripts"))

from virtual_slurm import Slurm, why_not

# Two ranks of one thread, on one node each.
SMALL = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
DATA = ["data.source=synthetic", "data.num_samples=256", "train.global_batch=64", "log.evaluate_every_epochs=0"]
STEPS, SEEN = 300, 10


def training(steps: int, *more: str) -> list[str]:
    """Return a network, and settings with which it trains so many steps in no time."""
    settings = [*DATA, "checkpoint.every_epochs=0", f"train.steps={steps}", *more]
    return ["lenet5", *(word for setting in settings for word in ("--set", setting))]


class Site:
    """A folder to submit jobs from, and the Slurm that runs them."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.environment = slurm.environment()
        self.path = [str(Path(sys.executable).parent), self.environment["PATH"]]
        self.environment["PYTHONPATH"] = str(ROOT)
        # Slurm's pmi2 reads 1024 bytes of a request; addresses of UCX may take more, and then no rank gets ahead.
        self.environment["MPIR_CVAR_CH4_NETMOD"] = "ofi"

    def submit(self, script: str, *words: str, options: list[str], **environment: str) -> str:
        """Hand in a job script and return the job's number."""
        command = ["sbatch", "--parsable", *options, script if script == "--wrap" else str(ROOT / "slurm" / script)]
        whole = self.environment | {"PATH": os.pathsep.join(self.path)} | environment
        done = subprocess.run(
            [*command, *words], cwd=self.folder, env=whole, text=True, capture_output=True, timeout=20
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what Slurm says of a job: JobState, ExitCode, Restarts ..."""
        words = self.slurm.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def until(self, job: str, happened: Callable[[], bool], limit_s: float = 120.0) -> None:
        """Wait for something that a job is about to do."""
        give_up = time.monotonic() + limit_s
        while not happened():
            assert time.monotonic() < give_up, f"{self.job(job)}\n{self.log(job)}"
            time.sleep(0.05)

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of these states, and return what Slurm says of it."""
        self.until(job, lambda: self.job(job)["JobState"] in states)
        return self.job(job)

    def finish(self, job: str) -> dict[str, str]:
        return self.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*-{job}*.log")))

    def run_folder(self, job: str) -> Path:
        return self.folder / "runs" / f"hpcnn-{job}"

    def steps(self, job: str) -> list[int]:
        """Return the steps that a run has made so far, those of before a restart included."""
        with contextlib.suppress(OSError, json.JSONDecodeError):
            lines = (self.run_folder(job) / "metrics.jsonl").read_text().splitlines()
            return [record["step"] for record in map(json.loads, lines) if record["event"] == "step"]
        return []

    def stand_in(self, script: str) -> None:
        """Put a shell script in the place of `hpcnn`."""
        (self.folder / "bin").mkdir()
        program = self.folder / "bin" / "hpcnn"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        self.path.insert(0, str(program.parent))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    if "HYDRA" not in launcher_version():
        pytest.skip("Slurm's pmi2 starts ranks of MPICH; its pmix needs PMIx libraries that are not everywhere")
    with Slurm(cpus=64, gpus=4) as running:
        yield running


@pytest.fixture
def site(slurm: Slurm, tmp_path: Path) -> Iterator[Site]:
    yield Site(slurm, tmp_path)
    slurm.ask("scancel", "--quiet", "--user=root")


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a checkpoint."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Return what two ranks train that nobody stops."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(2, "hpcnn", ["train", *training(STEPS), "--out", str(folder)], env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return tensors(folder / "final.h5")


def check_same(path: Path, expected: dict[str, np.ndarray]) -> None:
    """Compare bit by bit: as many ranks add in the same order, whether in one go or in two."""
    found = tensors(path)
    assert found.keys() == expected.keys()
    assert len(found) > 8
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# Jobs that run through.


def test_srun_starts_the_ranks(site: Site) -> None:
    job = site.submit("cpu.sbatch", *training(6), options=SMALL)
    assert site.finish(job)["JobState"] == "COMPLETED", site.log(job)
    assert site.steps(job) == [1, 2, 3, 4, 5, 6]
    assert (site.run_folder(job) / "final.h5").exists()


def test_mpiexec_starts_the_ranks(site: Site) -> None:
    job = site.submit("cpu.sbatch", *training(6, "plan.preset=data"), options=SMALL, LAUNCHER="mpiexec")
    assert site.finish(job)["JobState"] == "COMPLETED", site.log(job)
    assert site.steps(job) == [1, 2, 3, 4, 5, 6]
    # Two ranks of half a batch each, not two trainings.
    assert site.log(job).count("run folder") == 1


def test_the_array_of_a_scaling_study_trains_every_point_on_its_ranks(site: Site) -> None:
    def scale(*words: str) -> str:
        command = [sys.executable, "-m", "hpcnn", "scale", *words]
        environment = site.environment | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=site.folder, env=environment, text=True, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    settings = ["lenet5", *(word for setting in DATA[:3] for word in ("--set", setting))]
    launcher = ["--launcher", "sbatch", "--launcher-args=--mpi=pmi2", "--ranks-per-node", "1"]
    said = scale(*settings, "--ranks", "1,2", "--repeats", "1", "--steps", "6", *launcher, "--out", "study")
    job = re.search(r"submitted 2 runs as job (\d+)", said)
    assert job is not None, said
    for element in (0, 1):
        assert site.finish(f"{job[1]}_{element}")["JobState"] == "COMPLETED"
    assert "strong scaling" in scale("study")
    with (site.folder / "study" / "scaling.csv").open() as file:
        assert {row["ranks"] for row in csv.DictReader(file)} == {"1", "2"}


# Jobs that are stopped, and come back.


def stop_and_go_on(site: Site, stop: Callable[[str], object], *settings: str, options: list[str], **env: str) -> str:
    """Start a training, stop it in its middle, and return the job once it is queued again."""
    job = site.submit("cpu.sbatch", *training(STEPS, *settings), options=[*SMALL, *options], **env)
    site.until(job, lambda: len(site.steps(job)) >= SEEN)
    stop(job)
    site.wait(job, "PENDING")
    return job


def test_stopped_jobs_come_back_and_train_what_an_undisturbed_one_trains(
    site: Site, undisturbed: dict[str, np.ndarray]
) -> None:
    def usr1(job: str) -> None:  # what `--signal=B:USR1@120` sends
        site.slurm.ask("scancel", "--batch", "--signal=USR1", job)

    def preempt(job: str) -> None:
        site.submit("--wrap", "true", options=["--partition=main", "--nodes=2", "--exclusive"])

    jobs = [
        stop_and_go_on(site, preempt, options=["--partition=preemptible"]),  # first: it wants both nodes
        stop_and_go_on(site, usr1, options=[]),
        stop_and_go_on(site, usr1, options=[], LAUNCHER="mpiexec"),
    ]
    for job, reason in zip(jobs, ["SIGTERM", "SIGUSR1", "SIGUSR1"]):
        ended = site.finish(job)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.log(job)
        # Rank 0 says why, and may have heard of the signal by the other rank first.
        assert re.search(rf"stopped by ({reason}|a signal to another rank) after step", site.log(job)), site.log(job)
        assert site.steps(job) == list(range(1, STEPS + 1))
        check_same(site.run_folder(job) / "final.h5", undisturbed)


def test_a_job_whose_node_fails_goes_on_from_its_newest_checkpoint(
    site: Site, undisturbed: dict[str, np.ndarray]
) -> None:
    def fail(job: str) -> None:
        site.slurm.ask("scontrol", "update", "nodename=n2", "state=down", "reason=test")

    try:
        job = stop_and_go_on(site, fail, "checkpoint.every_steps=10", options=[])
    finally:
        site.slurm.ask("scontrol", "update", "nodename=n2", "state=idle")
    ended = site.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.log(job)
    assert site.steps(job) == list(range(1, STEPS + 1))
    check_same(site.run_folder(job) / "final.h5", undisturbed)


def test_a_job_that_is_killed_before_its_first_checkpoint_begins_again(site: Site) -> None:
    job = site.submit("cpu.sbatch", *training(10**6), options=SMALL)
    site.until(job, lambda: len(site.steps(job)) >= SEEN)
    site.slurm.ask("scancel", "--signal=KILL", f"{job}.0")  # all ranks, not the script
    assert site.finish(job)["JobState"] == "FAILED"
    assert not list(site.run_folder(job).glob("checkpoints/*.h5"))
    site.slurm.ask("scontrol", "requeue", job)
    site.until(job, lambda: site.job(job)["JobState"] == "RUNNING" and len(site.steps(job)) >= SEEN)
    assert site.steps(job)[:SEEN] == list(range(1, SEEN + 1))
    # Cancelled for good: the checkpoint that it writes and its code 75 do not queue it again.
    site.slurm.ask("scancel", job)
    site.wait(job, "CANCELLED")
    time.sleep(1.0)
    assert site.job(job)["JobState"] == "CANCELLED"


@pytest.mark.parametrize("launcher", ["", "mpiexec"])
def test_a_signal_while_python_starts_queues_the_job_again(site: Site, launcher: str) -> None:
    site.stand_in("touch started-$PMI_RANK; exec sleep 60")  # like Python, dies of USR1
    job = site.submit("cpu.sbatch", options=SMALL, LAUNCHER=launcher)
    site.until(job, lambda: len(list(site.folder.glob("started-*"))) == 2)
    site.slurm.ask("scancel", "--batch", "--signal=USR1", job)
    assert site.wait(job, "PENDING", "FAILED")["JobState"] == "PENDING", site.log(job)


# Jobs that fail.


def test_a_wrong_configuration_fails_the_job_once(site: Site) -> None:
    job = site.submit("cpu.sbatch", *training(5, "train.sped=1"), options=SMALL)
    ended = site.finish(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), site.log(job)
    assert site.log(job).count("hpcnn: error: config: unknown key 'train.sped'") == 1


def test_ranks_that_mpi_does_not_connect_are_refused(site: Site) -> None:
    job = site.submit("cpu.sbatch", *training(5), options=SMALL, MPI_TYPE="none")
    assert site.finish(job)["JobState"] == "FAILED"
    assert "the launcher started 2 tasks (SLURM_STEP_NUM_TASKS) but MPI connects only 1" in site.log(job)
    assert not site.run_folder(job).exists()


# The template for GPUs, with pretended ones: Slurm hands them out, a shell script says what a rank would be given.


@pytest.mark.parametrize(
    ("options", "ranks", "gpus"),
    [
        (["--ntasks-per-node=1", "--gpus-per-node=1"], 1, "0"),
        ([], 4, "0,1,2,3"),
        (["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"], 4, "0,1"),
    ],
    ids=["one GPU", "a node", "two nodes"],
)
def test_every_rank_sees_the_gpus_of_its_node(site: Site, options: list[str], ranks: int, gpus: str) -> None:
    site.stand_in('echo "$SLURM_LOCALID $CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS $*" >rank-$SLURM_PROCID')
    job = site.submit("gpu.sbatch", "resnet20", "--set", "train.epochs=2", options=options)
    assert site.finish(job)["JobState"] == "COMPLETED", site.log(job)
    per_node = gpus.count(",") + 1
    command = f"train --set device=cuda --out runs/hpcnn-{job} --resume resnet20 --set train.epochs=2"
    expected = {f"rank-{rank}": f"{rank % per_node} {gpus} 8 {command}\n" for rank in range(ranks)}
    assert {path.name: path.read_text() for path in site.folder.glob("rank-*")} == expected


def test_a_node_without_as_many_gpus_is_refused_by_slurm(site: Site) -> None:
    command = ["sbatch", "--test-only", "--gpus-per-node=5", str(ROOT / "slurm" / "gpu.sbatch")]
    done = subprocess.run(command, env=site.environment, text=True, capture_output=True, timeout=20)
    assert done.returncode != 0
    assert "Requested node configuration is not available" in done.stderr


def test_a_gpu_job_that_is_stopped_comes_back(site: Site) -> None:
    site.stand_in("trap 'exit 75' USR1; touch started-$SLURM_PROCID; while :; do sleep 0.1; done")
    job = site.submit("gpu.sbatch", options=[])
    site.until(job, lambda: len(list(site.folder.glob("started-*"))) == 4)
    site.slurm.ask("scancel", "--batch", "--signal=USR1", job)
    assert site.wait(job, "PENDING", "FAILED")["JobState"] == "PENDING", site.log(job)


# The pretended nodes themselves.


def left_of(folder: str) -> list[str]:
    """Return the command lines of processes that belong to the Slurm of this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
            if command and folder.encode() in command + (entry / "environ").read_bytes():
                found.append(command.replace(b"\0", b" ").decode())
    return found


@pytest.mark.parametrize("ending", ["SIGTERM", "failure"])
def test_nothing_is_left_behind(slurm: Slurm, ending: str, tmp_path: Path) -> None:
    script = 'echo "$SLURM_CONF"; sbatch --wrap "sleep 100" >&2; '
    script += 'srun --unbuffered --input=none -N2 -n2 sh -c "echo started; exec sleep 100" & read -r _; exit 7'
    command = [sys.executable, str(ROOT / "scripts" / "virtual_slurm.py"), "run", "--", "bash", "-c", script]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    folder = str(Path(process.stdout.readline().strip()).parent)
    assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
    assert sum("sleep 100" in command for command in left_of(folder)) >= 2
    if ending == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.wait(30) == (143 if ending == "SIGTERM" else 7)
    assert not Path(folder).exists()
    assert left_of(folder) == []
    # The other Slurm has not noticed.
    assert slurm.ask("sinfo", "--noheader", "--format=%D").strip() == "2"
