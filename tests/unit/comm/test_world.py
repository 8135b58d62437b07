"""What can be known of a job without starting one."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys

import pytest

from hpcnn.comm import library
from hpcnn.comm.library import NodeShare
from hpcnn.comm.world import refuse_singleton
from hpcnn.errors import CommError


def test_importing_hpcnn_and_its_comm_package_does_not_start_mpi():
    code = "import hpcnn, hpcnn.comm, hpcnn.comm.world, sys; sys.exit('mpi4py' in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", code], env=dict(os.environ, PYTHONPATH=".")).returncode


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
        {"PMI_SIZE": "4"},
        {"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_one_rank_where_the_launcher_says_four_is_refused(environment):
    with pytest.raises(CommError, match=r"started 4 tasks.*--mpi=pmix or --mpi=pmi2"):
        refuse_singleton(1, environment)
    refuse_singleton(4, environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "4"},  # the batch script itself
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"},
        {"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"},  # mpiexec -n 1 in an allocation
        {"PMI_SIZE": "nonsense"},
    ],
)
def test_one_rank_that_is_meant_to_be_alone_is_welcome(environment):
    refuse_singleton(1, environment)


@pytest.mark.parametrize("error", [ImportError("No module named 'mpi4py'"), RuntimeError("cannot load MPI library\nx")])
def test_a_missing_mpi_library_is_explained(monkeypatch, error):
    real = builtins.__import__

    def without_mpi(name, *rest, **options):
        if name == "mpi4py":
            raise error
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_mpi)
    with pytest.raises(CommError, match=r"pip install 'hpcnn\[mpich\]'"):
        library.load.__wrapped__()


def test_cores_are_divided_among_the_ranks_that_share_them():
    share = NodeShare(local_rank=0, local_size=4, num_cores=16, num_sharing=3)
    assert (5, False) == (share.num_threads, share.rationed)
    assert share._replace(num_cores=2).num_threads == 1
