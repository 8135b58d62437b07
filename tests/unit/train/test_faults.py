"""Training jobs in which ranks disagree or hang end soon, with one line that names who and what."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import Result, launch, reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

JOB = """
import os, signal, sys, threading, time
from hpcnn.cli.main import main
from hpcnn.comm import start
rank = start().rank
sets = ["train.steps=8", "train.global_batch=16", "exchange.bucket_bytes=1", "checkpoint.every_epochs=0", *SETS]
sys.exit(main(["train", "lenet5", "--out", "run", *[word for one in sets for word in ("--set", one)]]))
"""


def run(tmp_path: Path, sets: str, before: str = "") -> Result:
    program = tmp_path / "job.py"
    program.write_text(before + JOB.replace("*SETS", f"*({sets})"))
    return launch(3, program, cwd=tmp_path, timeout=90)


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("exchange.bucket_bytes=7000", "configuration"),
        ("model.dropout=0.25", "configuration"),
        ("train.lr=0.2", "conf"),
    ],
)
def test_ranks_that_have_read_another_configuration_are_named_before_the_first_step(tmp_path, setting, what):
    result = run(tmp_path, f"['{setting}'] if rank == 2 else []")
    assert result.returncode != 0
    (line,) = result.errors
    assert "rank 2" in line
    assert f"another {what}" in line
    assert "same file" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_gpu_that_is_not_there_is_reported_once(tmp_path):
    result = run(tmp_path, "['device=cuda']", 'import sys\nsys.modules["cupy"] = None\n')
    assert result.returncode != 0
    (line,) = result.errors
    assert "gpu: CuPy cannot be imported" in line
    assert "pip install" in line


HANG = """
import functools, time
import hpcnn.nn.linear as linear
from hpcnn.comm import start
world = functools.cache(start)
calls = 0
original = linear.Linear.backward_weight
def backward_weight(self, *args):
    global calls
    calls += self.spec.name == "fc2"
    if world().rank == 1 and calls == 4:
        time.sleep(80)
    return original(self, *args)
linear.Linear.backward_weight = backward_weight
"""


@pytest.mark.parametrize("kind", ["allreduce", "sharded"])
def test_a_rank_that_hangs_while_it_computes_is_named_with_the_bucket_and_the_step(tmp_path, kind):
    result = run(tmp_path, f"['exchange.timeout_seconds=2', 'exchange.kind={kind}']", HANG)
    assert result.returncode != 0
    assert result.seconds < 40
    (line,) = result.errors
    assert "rank 1" in line
    # It has joined the sum of fc3, but it does not look after what comes then either.
    assert "fc2" in line or (kind == "sharded" and "'parameters of fc3'" in line)
    assert "while others were at step 5" in line  # gradients of step 4 travel behind it


MIXING_HANG = """
import functools, time
from hpcnn.comm import start
from hpcnn.train.rules.mixing import Mixing
world = functools.cache(start)
original = Mixing.after_step
def after_step(self, step):
    if world().rank == 2 and step == 4:
        time.sleep(80)
    return original(self, step)
Mixing.after_step = after_step
"""


def test_a_group_that_hangs_is_named_though_others_wait_for_one_another_in_another_world(tmp_path):
    settings = "['average.rule=mixing', 'exchange.timeout_seconds=2', 'train.global_batch=18', 'train.warmup_epochs=0']"
    result = run(tmp_path, settings, MIXING_HANG)
    assert result.returncode != 0
    (line,) = result.errors
    assert "rank 2 (host" in line
    assert "has not joined 'mixing, stage" in line
