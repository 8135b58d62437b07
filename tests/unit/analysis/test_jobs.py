"""Launchers, batch scripts, and the ends that jobs come to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcnn.analysis import jobs
from hpcnn.analysis.jobs import Launcher
from hpcnn.errors import CommError, ConfigError


def test_known_launchers_are_told_the_number_of_ranks() -> None:
    program, *words = Launcher.of("mpirun", "--bind-to core").command(3)
    assert Path(program).name in ("mpirun", "mpiexec")
    assert ["-n", "3", "--bind-to", "core"] == words
    srun = ["srun", "--ntasks=6", "--kill-on-bad-exit=1"]
    assert [*srun, "--mpi=pmi2"] == Launcher.of("srun", "--mpi=pmi2").command(6)
    assert [*srun, "--nodes=2", "--ntasks-per-node=4"] == Launcher.of("srun", ranks_per_node=4).command(6)
    assert ["--nodes=1", "--ntasks-per-node=2"] == Launcher.of("sbatch", ranks_per_node=4).command(2)[3:]


def test_any_command_is_a_launcher_that_says_where_the_number_goes() -> None:
    launcher = Launcher.of("cluster run {hosts} --ppn {ranks_per_node} --name 'a b' --", ranks_per_node=2)
    assert ["cluster", "run", "2", "--ppn", "2", "--name", "a b", "--"] == launcher.command(4)
    assert ["cluster", "run", "1", "--ppn", "1", "--name", "a b", "--"] == launcher.command(1)
    assert ["x", "5"] == Launcher.of("x {hosts}").command(5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mpiexec.hydra -n 4", "", r"\{ranks\} or \{hosts\} stands for their number"),
        ("mpirun -n {ranks} {cores}", "", r"no meaning of \{cores\}"),
        ("srun", "--comment='open", "not words of a shell"),
        ("", "", "must be one of mpirun, srun, sbatch"),
    ],
)
def test_a_launcher_that_cannot_work_is_refused(name: str, arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Launcher.of(name, arguments)


def test_the_batch_script_is_one_array_whose_tasks_run_their_point(tmp_path: Path) -> None:
    names = ["strong-data-allreduce-auto-1-1", "odd name"]
    text = jobs.batch_script(tmp_path, names, 8, ["echo", "run", "--launcher-args=-c 2"], "--time=30 -p x", 4)
    lines = text.splitlines()
    assert "#!/bin/bash" == lines[0]
    assert "#SBATCH --job-name=hpcnn-scale --array=0-1" in lines
    assert {"#SBATCH --ntasks=8", "#SBATCH --ntasks-per-node=4", "#SBATCH --time=30 -p x"} <= set(lines)
    assert f"#SBATCH --output={tmp_path}/slurm-%A-%a.log" in lines
    last_directive = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last_directive < lines.index("set -euo pipefail")  # sbatch reads none behind the first command
    for task, name in enumerate(names):
        environment = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True)
        assert f"run --launcher-args=-c 2 {name}\n" == done.stdout
    shellcheck = shutil.which("shellcheck")
    if shellcheck:
        (tmp_path / "scale.sbatch").write_text(text)
        subprocess.run([shellcheck, str(tmp_path / "scale.sbatch")], check=True)


def test_sbatchs_refusal_is_passed_on_and_the_script_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, sbatch = tmp_path / "scale.sbatch", tmp_path / "sbatch"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommError, match=r"there is no sbatch here; submit '.*scale.sbatch'"):
        jobs.submit(script, "text")
    assert "text" == script.read_text()
    sbatch.write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    sbatch.chmod(0o700)
    with pytest.raises(CommError, match="invalid partition"):
        jobs.submit(script, "text")
    sbatch.write_text("#!/bin/sh\necho '17;cluster'\n")
    assert "17" == jobs.submit(script, "text")


def test_a_failed_job_is_explained_by_its_own_error_or_else_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    assert "" == jobs.run(["sh", "-c", "echo fine"], log, 10.0)
    assert "fine\n" == log.read_text()
    words = "echo 'hpcnn: error: data: no such file.' >&2; echo 'Abort(1)'; exit 3"
    assert "exit status 3: data: no such file." == jobs.run(["sh", "-c", words], log, 10.0)
    assert "exit status 4: bye" == jobs.run(["sh", "-c", "echo bye; echo; exit 4"], log, 10.0)
    assert "exit status 5: no output" == jobs.run(["sh", "-c", "exit 5"], log, 10.0)
    with pytest.raises(CommError, match="cannot start '/no/such/mpirun'"):
        jobs.run(["/no/such/mpirun", "-n", "1"], log, 10.0)


def test_a_job_over_its_limit_is_ended_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "GRACE_S", 0.2)
    mark = tmp_path / "pid"
    deaf = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    deaf += f"p = subprocess.Popen(['sleep', '60']); open({str(mark)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    reason = jobs.run([sys.executable, "-c", deaf], tmp_path / "log", 1.0)
    assert reason.startswith("no end after 1 s")
    child = int(mark.read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("a process of the job outlived it")


def test_a_job_does_not_take_itself_for_a_rank_of_the_job_it_is_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    jobs.run(["sh", "-c", "echo ${PMI_RANK-none} $SLURM_JOB_ID"], tmp_path / "log", 10.0)
    assert "none 5\n" == (tmp_path / "log").read_text()
