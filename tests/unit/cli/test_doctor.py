"""The doctor: what it reports here, and that it recognises what is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcnn.cli import doctor, environment
from hpcnn.cli.checks.problem import Problem
from hpcnn.errors import ConfigError
from tests import launch


def report(**variables: str) -> tuple[int, dict]:
    """Run `hpcnn doctor --json` in a process of its own, and return its exit code and report."""
    command = [sys.executable, "-m", "hpcnn", "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=55, check=False, env=launch.environment(variables)
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_report_has_the_library_that_two_ranks_really_use() -> None:
    code, facts = report()
    assert code == 0, facts["problems"]
    assert [0, 1] == [rank["rank"] for rank in facts["ranks"]]
    assert any("libmpi" in path for path in facts["mpi"]["mapped"])
    assert facts["operators"]["implementation"].split()[0] in ("onednn", "numpy")
    assert "HDF5" not in facts["hdf5"]
    assert facts["blas"]["libraries"]
    assert {"run folder", "cache", "shared memory"} == set(facts["storage"])
    assert facts["trial"]["started"].endswith("-n 2")
    assert all(one["wrong_ranks"] == [] for one in facts["messages"]["sums"])
    assert facts["messages"]["pairs"]


def test_missing_mpi_library_is_reported_with_its_fix_and_exit_code_1() -> None:
    code, facts = report(MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert code == 1
    essential = [problem for problem in facts["problems"] if problem["essential"]]
    assert any("MPI" in problem["what"] for problem in essential)
    assert all(problem["fix"] for problem in essential)
    assert facts["packages"]["numpy"]


def test_onednn_path_that_does_not_load_is_reported_and_the_rest_still_stands() -> None:
    code, facts = report(HPCNN_ONEDNN="/nowhere/libdnnl.so")
    assert code == 1
    assert any("/nowhere/libdnnl.so" in problem["what"] for problem in facts["problems"])
    assert facts["ranks"]


@pytest.mark.parametrize(("found", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")])
def test_ranges_and_numbers_are_inverse(found: list[int], text: str) -> None:
    assert text == environment.ranges(found)
    assert set(found) == environment.numbers(text)


def test_mapped_libraries_are_those_of_message_passing(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 00000000 08:01 11 /opt/my mpi/lib/libmpi.so.12\n"
        "7f01-7f02 r-xp 00000000 08:01 11 /opt/my mpi/lib/libmpi.so.12\n"
        "7f02-7f03 r-xp 00000000 08:01 12 /lib/libpmix.so.2\n"
        "7f03-7f04 r-xp 00000000 08:01 13 /lib/libc.so.6\n"
        "7f04-7f05 rw-p 00000000 00:00 0\n"
    )
    assert ["/lib/libpmix.so.2", "/opt/my mpi/lib/libmpi.so.12"] == environment.mapped_libraries(maps)


def test_trial_launch_tells_of_a_launcher_that_is_not_there() -> None:
    found, failure = environment.trial_launch(["/nowhere/mpiexec"])
    assert found is None
    assert "/nowhere/mpiexec" in failure


def test_text_report_names_problems_and_fixes() -> None:
    text = doctor.render({"ranks": [], "problems": [Problem("it is broken", "Mend it.")._asdict()]})
    assert "BROKEN: it is broken" in text
    assert "Mend it." in text
    assert "everything essential works" not in text


def test_text_lists_some_of_many_ranks() -> None:
    many = [{"rank": number, "host": "a", "local_rank": number, "cores": "0", "threads": 1} for number in range(100)]
    lines = doctor.render({"ranks": many, "problems": []}).splitlines()
    assert lines[1].split() == ["rank", "host", "local_rank", "cores", "threads"]
    assert sum(line.split()[1:2] == ["a"] for line in lines) == doctor.MOST_RANKS
    assert any(f"and {100 - doctor.MOST_RANKS} more" in line for line in lines)


@pytest.fixture(scope="module")
def mpiexec() -> None:
    if reason := launch.reason_to_skip():
        pytest.skip(reason)


@pytest.mark.usefixtures("mpiexec")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_ranks_of_a_job_are_reported_once(n: int, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    args = ["doctor", "--json", str(file), "--out", str(tmp_path / "runs")]
    done = launch.launch(n, "hpcnn", args, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.count("everything essential works") == 1
    facts = json.loads(file.read_text())
    assert [rank["rank"] for rank in facts["ranks"]] == list(range(n))
    assert {rank["threads"] for rank in facts["ranks"]} == {1}
    assert sum("node" in rank for rank in facts["ranks"]) == 1
    assert facts["storage"]["run folder"]["path"] == str(tmp_path / "runs")
    assert bool(facts["messages"]["sums"]) == (n > 1)
    assert [file] == list(tmp_path.iterdir())


@pytest.mark.usefixtures("mpiexec")
@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--strict"], 1)])
def test_advice_is_an_error_for_the_strict_only(flags: list[str], code: int, tmp_path: Path) -> None:
    done = launch.launch(1, "hpcnn", ["doctor", *flags], env={"OMP_NUM_THREADS": "4096"}, cwd=tmp_path)
    assert done.returncode == code
    assert "runs 4096 threads" in done.stdout
    assert done.errors == []


STALLED = """
import sys, time
from hpcnn.analysis import self_test
from hpcnn.cli.checks import ranks
from hpcnn.cli.main import main
ranks.WATCH_S = 1.0
right = self_test.allreduce
def stall(comm, array, name):
    if comm.rank == 1 and name == "ring":
        {fault}
    right(comm, array, name)
self_test.allreduce = stall
sys.exit(main(["doctor"]))
"""


@pytest.mark.usefixtures("mpiexec")
def test_a_rank_that_hangs_in_the_self_test_is_named(tmp_path: Path) -> None:
    program = tmp_path / "stalled.py"
    program.write_text(STALLED.format(fault="time.sleep(60)"))
    done = launch.launch(2, program, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    (error,) = done.errors
    assert "rank 1" in error
    assert "the doctor's self-test" in error
    assert done.seconds < 30


FAKE_LAUNCHER = """#!/bin/sh
# Starts two processes that know nothing of each other, as a launcher does whose protocol the library does not speak.
[ "$1" = --version ] && echo "mpirun (Open MPI) 4.1.4" && exit
shift 2
SLURM_NTASKS=2; export SLURM_NTASKS
{variables} "$@" & {variables_of_1} "$@"; second=$?
wait $! && exit $second
"""


def fake_launcher(folder: Path, variables: str = "", variables_of_1: str = "") -> Path:
    """Write a launcher that does not connect its two ranks."""
    path = folder / "mpiexec"
    path.write_text(FAKE_LAUNCHER.format(variables=variables, variables_of_1=variables_of_1))
    path.chmod(0o755)
    return path


def test_a_launcher_of_another_mpi_is_found_on_trial(tmp_path: Path) -> None:
    fake_launcher(tmp_path)
    code, facts = report(PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_NTASKS="2")
    assert code == 1
    (problem,) = (problem for problem in facts["problems"] if problem["essential"])
    assert "ranks do not find each other" in problem["what"]
    assert problem["fix"]
    assert len(facts["ranks"]) == 1  # the library itself is fine, alone


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ("env SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID={}", "started 2 tasks (SLURM_STEP_NUM_TASKS)"),
        ("env OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK={}", "ranks do not find each other"),
    ],
)
def test_two_singletons_of_a_launcher_speak_once_and_exit_with_1(mark: str, what: str, tmp_path: Path) -> None:
    launcher = fake_launcher(tmp_path, mark.format(0), mark.format(1))
    done = subprocess.run(
        [str(launcher), "-n", "2", sys.executable, "-m", "hpcnn", "doctor"],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        env=launch.environment(),
    )
    assert done.returncode == 1
    assert done.stderr == ""
    assert done.stdout.count("BROKEN") == 1
    assert what in done.stdout
    assert "everything essential works" not in done.stdout


@pytest.mark.usefixtures("mpiexec")
def test_a_machine_file_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    alone = subprocess.run(
        [sys.executable, "-m", "hpcnn", "doctor", "--machine", "no.toml"],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        env=launch.environment(),
        cwd=tmp_path,
    )
    job = launch.launch(2, "hpcnn", ["doctor", "--machine", "no.toml"], cwd=tmp_path)
    assert alone.returncode == job.returncode == 1
    for stderr in (alone.stderr, job.stderr):
        (line,) = (line for line in stderr.splitlines() if line.startswith("hpcnn: error"))
        assert "cannot read 'no.toml'" in line


def test_unwritable_report_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Name another file"):
        doctor._write(str(tmp_path / "no" / "report.json"), {}, "text")
