"""Jobs in which ranks fail: each must end soon, with a non-zero code and exactly one line that says why."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcnn.comm import abort
from tests.launch import Result, environment, launch, reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

START = """
import sys, threading, time
from hpcnn.comm import run_and_exit, start
from hpcnn.errors import ConfigError, DataError
"""
END = "sys.exit(run_and_exit(main, settle_s=1.0))\n"


def run_job(folder: Path, body: str, n: int = 3, **options) -> Result:
    """Run `main(world)`, whose body is given, under run_and_exit on n ranks."""
    script = folder / "job.py"
    indented = textwrap.indent(body.strip(), "    ")
    script.write_text(f"{START}\ndef main():\n    world = start()\n{indented}\n    return 0\n{END}")
    return launch(n, script, timeout=40, **options)


def test_a_job_without_errors_exits_with_zero_and_says_nothing(tmp_path):
    result = run_job(tmp_path, "world.barrier()")
    assert (0, []) == (result.returncode, result.errors)


def test_a_surprise_on_one_rank_aborts_the_ranks_that_wait_for_it(tmp_path):
    result = run_job(tmp_path, "if world.rank == 1: raise RuntimeError('boom')\nworld.barrier()")
    assert result.returncode != 0
    assert ["hpcnn: error on rank 1: RuntimeError: boom"] == result.errors
    assert 1 == result.stderr.count("Traceback")
    assert result.seconds < 15


def test_a_surprise_in_a_background_thread_aborts_the_job(tmp_path):
    result = run_job(
        tmp_path,
        """
def work():
    raise RuntimeError('boom')
if world.rank == 2: threading.Thread(target=work, name='loader').start()
world.barrier() if world.rank else time.sleep(60)""",
    )
    assert result.returncode != 0
    assert ["hpcnn: error on rank 2 in thread 'loader': RuntimeError: boom"] == result.errors
    assert result.seconds < 15


def test_a_users_error_on_all_ranks_is_one_line_and_an_orderly_end(tmp_path):
    result = run_job(tmp_path, "raise ConfigError('config: no such key.')")
    assert 2 == result.returncode
    assert ["hpcnn: error: config: no such key."] == result.errors
    assert "Traceback" not in result.stderr
    assert "abort" not in result.stderr.lower()


def test_a_users_error_on_one_rank_that_the_others_wait_for_aborts_the_job(tmp_path):
    result = run_job(tmp_path, "if world.rank == 1: raise DataError('data: gone.')\nworld.barrier()")
    assert result.returncode != 0
    assert ["hpcnn: error on rank 1: data: gone."] == result.errors
    assert result.seconds < 25


def test_of_two_ranks_that_fail_while_another_waits_the_lower_one_reports(tmp_path):
    result = run_job(tmp_path, "if world.rank: raise DataError('data: gone.')\nworld.barrier()")
    assert result.returncode != 0
    assert ["hpcnn: error on rank 1: data: gone."] == result.errors


def test_a_users_error_on_one_rank_when_the_others_are_done_is_one_line_and_a_common_exit_code(tmp_path):
    result = run_job(tmp_path, "if world.rank == 2: raise ConfigError('config: odd.')")
    assert 2 == result.returncode
    assert ["hpcnn: error on rank 2: config: odd."] == result.errors
    assert "abort" not in result.stderr.lower()


def test_an_agreed_error_is_raised_everywhere_and_reported_once(tmp_path):
    result = run_job(tmp_path, "world.agree(DataError('data: gone.') if world.rank == 1 else None)")
    assert 1 == result.returncode
    assert ["hpcnn: error: data: gone. (on rank 1)"] == result.errors


def test_an_exit_code_returned_by_all_ranks_passes_through_even_if_some_come_late(tmp_path):
    result = run_job(tmp_path, "time.sleep(2 * (world.rank == 0))\nreturn 75")
    assert (75, []) == (result.returncode, result.errors)


def test_without_run_and_exit_a_surprise_still_aborts(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(f"{START}\nworld = start()\nif world.rank == 1: raise RuntimeError('boom')\nworld.barrier()\n")
    result = launch(3, script, timeout=40)
    assert result.returncode != 0
    assert ["hpcnn: error on rank 1: RuntimeError: boom"] == result.errors


def test_without_run_and_exit_a_users_error_on_all_ranks_is_one_line(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(f"{START}\nstart()\nraise DataError('data: gone.')\n")
    result = launch(3, script, timeout=40)
    assert 1 == result.returncode
    assert ["hpcnn: error: data: gone."] == result.errors


def test_a_single_rank_reports_a_surprise_with_its_traceback(tmp_path):
    result = run_job(tmp_path, "raise RuntimeError('boom')", n=1)
    assert 1 == result.returncode
    assert ["hpcnn: error: RuntimeError: boom"] == result.errors
    assert 1 == result.stderr.count("Traceback")


def test_a_background_thread_that_fails_ends_a_single_rank_too(tmp_path):
    result = run_job(tmp_path, "threading.Thread(target=lambda: 1 / 0, name='loader').start()\ntime.sleep(60)", n=1)
    assert 1 == result.returncode
    assert ["hpcnn: error in thread 'loader': ZeroDivisionError: division by zero"] == result.errors
    assert result.seconds < 15


def test_tasks_that_mpi_does_not_connect_are_refused(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(f"{START}\nsys.exit(run_and_exit(lambda: start().size))\n")
    slurm = environment({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"})
    result = subprocess.run([sys.executable, str(script)], env=slurm, capture_output=True, text=True, timeout=40)
    assert 1 == result.returncode
    assert result.stderr.startswith("hpcnn: error: comm: the launcher started 4 tasks (SLURM_STEP_NUM_TASKS)")
    assert "--mpi=pmix" in result.stderr


def test_a_rank_that_ends_the_job_does_nothing_more_even_where_mpi_abort_returns(monkeypatch, capsys):
    class Died(BaseException):
        pass

    def die(code: int) -> None:
        raise Died(code)

    aborted = []
    monkeypatch.setattr(abort, "load", lambda: SimpleNamespace(COMM_WORLD=SimpleNamespace(Abort=aborted.append)))
    monkeypatch.setattr(abort, "DEATH_S", 0.01)
    monkeypatch.setattr(os, "_exit", die)
    with pytest.raises(Died):
        abort.end_job("rank 2 is gone.")
    assert [1] == aborted
    assert "hpcnn: error: rank 2 is gone.\n" == capsys.readouterr().err
