"""Launchers and libraries that do or do not belong together, and Slurm's numbers beside the world's."""

from __future__ import annotations

import pytest

from hpcnn.cli.checks import launch

GOOD = {"thread_level": "multiple", "vendor": "MPICH 5.0.2"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/usr/bin/mpiexec (HYDRA Version: 4.0.2)", "MPICH"),
        ("/usr/bin/mpirun (mpirun (Open MPI) 4.1.4)", "Open MPI"),
        ("mpiexec (OpenRTE) 4.1.4", "Open MPI"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18", "Intel MPI"),
        ("Open MPI 5.0.11", "Open MPI"),
        ("MVAPICH2 2.3.7", "MVAPICH"),
        ("/opt/intel/openmpi/bin/mpirun (mpirun (Open MPI) 4.1.4)", "Open MPI"),
        ("MPICH Version: 4.2\nMPICH configure: CC=icc --prefix=/opt/intel", "MPICH"),
        ("something else 1.0", None),
        ("", None),
    ],
)
def test_family_is_read_from_what_programs_say_of_themselves(text: str, name: str | None) -> None:
    assert launch.family(text) == name


def test_strangers_are_both_named() -> None:
    problem = launch.strangers("mpirun (Open MPI) 4.1.4", "MPICH 5.0.2")
    assert problem.essential
    assert "the launcher is Open MPI's, the MPI library MPICH's" in problem.what
    assert "mpiexec of MPICH" in problem.fix
    assert "launcher unknown, library MPICH 5.0.2" in launch.strangers("", "MPICH 5.0.2").what


def test_clash_is_claimed_only_where_it_is_known() -> None:
    assert launch.clash("Open MPI", "MPICH Version: 5.0.2\nMPICH configure: --with-pm=hydra").essential
    assert launch.clash("MPICH", "Open MPI v5.0.11").essential
    assert launch.clash("Open MPI", "MPICH Version: 5.0.2\nMPICH configure: --with-pmi=pmix") is None
    assert launch.clash("/usr/bin/mpiexec (HYDRA Version: 4.0.2)", "Intel(R) MPI Library 2021.18") is None
    assert launch.clash("", "Open MPI v5.0.11") is launch.clash("Open MPI", "") is None


def test_hydra_starts_all_that_speak_its_protocol() -> None:
    assert launch.fits("MPICH", "Intel MPI")
    assert not launch.fits("Open MPI", "MPICH")


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_ID": "0"}, "Open MPI"),
        ({"SLURM_STEP_ID": "0", "PMI_SIZE": "2"}, "srun"),
        ({"PMI_SIZE": "2"}, "MPICH"),
        ({"SLURM_NTASKS": "2"}, None),
    ],
)
def test_starter_is_read_from_the_variables_it_left(variables: dict[str, str], name: str | None) -> None:
    assert launch.starter(variables) == name


@pytest.mark.parametrize(
    ("library", "size", "variables", "what", "fix", "essential"),
    [
        (GOOD | {"thread_level": "serialized"}, 2, {}, "'serialized'", "MPICH_MAX_THREAD_SAFETY", True),
        (GOOD, 1, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "2 tasks and MPI connects 1", "=pmi2", True),
        (
            GOOD | {"vendor": "Open MPI 5.0"}, 4, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"},
            "8 tasks and MPI connects 4", "=pmix", True,
        ),
        (GOOD, 2, {"PMI_SIZE": "2", "SLURM_NTASKS": "8"}, "2 ranks in an allocation of 8", "--ntasks=2", False),
    ],
)  # fmt: skip
def test_contradictions(library: dict, size: int, variables: dict, what: str, fix: str, essential: bool) -> None:
    (problem,) = launch.judge(library, size, variables)
    assert what in problem.what
    assert fix in problem.fix
    assert problem.essential == essential


def test_a_world_that_is_as_large_as_slurm_says_is_fine() -> None:
    assert launch.judge(GOOD, 4, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}) == []
    assert launch.judge(GOOD, 1, {"SLURM_NTASKS": "8"}) == []  # a single rank in a batch script
