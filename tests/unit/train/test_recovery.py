"""Runs that lose ranks: under Open MPI with ULFM the others go on and come to the same end, elsewhere the run ends."""

from __future__ import annotations

import signal
import sys
from functools import cache
from pathlib import Path

import pytest

from hpcnn.train.kept import distance
from tests.launch import launch, launcher_version, reason_to_skip

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import chaos_ranks
from chaos_ranks import Blow

OPEN_MPI = any(word in launcher_version() for word in ("Open MPI", "PRRTE"))
jobs = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())
survivable = pytest.mark.skipif(
    not OPEN_MPI or bool(reason_to_skip()), reason="only Open MPI lets ranks outlive others"
)


def test_copies_are_kept_on_another_node_where_there_is_one():
    assert distance(["a", "a", "b", "b"]) == 2
    assert distance(["a", "b", "a", "b"]) == 1
    assert distance(["a", "a", "a", "b", "b"]) == 1  # no number of ranks ahead is elsewhere for all
    assert distance(["a", "a", "a"]) == 1
    assert distance(["a"]) == 1


@jobs
def test_what_the_library_cannot_do_is_refused_at_the_start(tmp_path):
    settings = ("--set", "fault.on_rank_failure=continue", "--out", "run")
    result = launch(2, "hpcnn", ["train", "lenet5", *settings], cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.errors
    assert "mpirun --with-ft ulfm" in line
    assert not (tmp_path / "run").exists()


@cache
def undisturbed(folder: Path) -> Path:
    """Return the final model of a run that loses nobody."""
    assert chaos_ranks.train(folder / "quiet", 4, "lenet5", ["train.steps=30"]).code == 0
    return folder / "quiet" / "final.h5"


CASES = {
    "the first rank": ([Blow(12, 0.0, 0)], ()),
    "with slices of the optimizer": ([Blow(14, 0.01, 2)], ("exchange.kind=sharded",)),
    "with parts of layers": ([Blow(3, 0.0, 1), Blow(22, 0.0, 3)], ("plan.preset=model",)),
    "a rank that hangs": ([Blow(15, 0.0, 1, signal.SIGSTOP)], ("exchange.timeout_seconds=2",)),
    "two at once": ([Blow(15, 0.0, 1), Blow(15, 0.0, 2)], ("exchange.kind=sharded",)),
}
SPARED = {
    "the first rank": (1, [Blow(12, 0.0, 0)], ()),
    "one after the other": (2, [Blow(8, 0.0, 3), Blow(20, 0.01, 4)], ("plan.preset=model",)),
    "one that stands by, and one that trains": (2, [Blow(5, 0.0, 4), Blow(18, 0.0, 2)], ("exchange.kind=sharded",)),
    "more than stand by": (1, [Blow(15, 0.0, 1), Blow(15, 0.0, 2)], ("exchange.kind=sharded",)),
}
"""Ranks that stand by, behind four; which die; and settings."""


@survivable
@pytest.mark.parametrize("case", CASES)
def test_the_others_come_to_the_end_of_an_undisturbed_run(tmp_path_factory, tmp_path, case):
    blows, settings = CASES[case]
    reference = undisturbed(tmp_path_factory.getbasetemp())
    end = chaos_ranks.train(tmp_path / "run", 4, "lenet5", ["train.steps=30", *settings], blows)
    assert end.code == 0, end.output
    assert "go on from step" in end.output
    assert chaos_ranks.difference(reference, tmp_path / "run" / "final.h5") < 1e-10
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().count('"event": "step"')
    assert steps == 30, "each step stands in the record once"


@survivable
@pytest.mark.parametrize("case", SPARED)
def test_ranks_that_stand_by_take_the_places_of_those_that_die(tmp_path_factory, tmp_path, case):
    spares, blows, settings = SPARED[case]
    reference = undisturbed(tmp_path_factory.getbasetemp())
    settings = ["train.steps=30", f"fault.spare_ranks={spares}", *settings]
    end = chaos_ranks.train(tmp_path / "run", 4 + spares, "lenet5", settings, blows)
    assert end.code == 0, end.output
    assert "stood by and takes part; " in end.output
    assert chaos_ranks.difference(reference, tmp_path / "run" / "final.h5") < 1e-10
    left = 3 if case == "more than stand by" else 4
    assert f"{left} go on from step" in end.output
    assert "Traceback" not in end.output


@survivable
def test_ranks_that_stand_by_end_with_the_others(tmp_path):
    end = chaos_ranks.train(tmp_path / "run", 3, "lenet5", ["fault.spare_ranks=1", "train.lr=1e30"], timeout=60)
    assert end.code == 1
    assert 1 == sum(line.startswith("hpcnn: error") for line in end.output.splitlines()), end.output


@survivable
def test_a_run_needs_ranks_that_do_not_stand_by(tmp_path):
    end = chaos_ranks.train(tmp_path / "run", 2, "lenet5", ["fault.spare_ranks=2"], timeout=60)
    assert end.code == 2
    assert "leaves none of 2 ranks to train" in end.output


@survivable
def test_a_run_that_is_to_stop_ends_with_one_clear_error(tmp_path):
    end = chaos_ranks.train(tmp_path / "run", 3, "lenet5", ["fault.on_rank_failure=stop"], [Blow(8, 0.0, 1)], 60)
    assert end.code not in (0, None)
    errors = [line for line in end.output.splitlines() if line.startswith("hpcnn: error")]
    assert errors
    assert "a rank died" in errors[0]
    assert "Traceback" not in end.output
