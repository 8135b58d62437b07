"""Every kind of collective, left out by one rank: the watchdog names that rank and what it has not joined."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.launch import launch, reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())

# Instead of ending the job, the watchdogs note what they would have said; the rank that stayed away comes in the end.
DRIVER = """
import json, sys, time
import numpy as np
from hpcnn.comm import collectives, movement, persistent, run_and_exit, start, watchdog
from hpcnn.comm import world as worlds
from hpcnn.plan.layout import Layout
from hpcnn.plan.movement import Movement

ABSENT_S, TIMEOUT_S = 1.0, 0.3
worlds.WATCH_S, watchdog.LOOK_S = 0.05, 0.02


def halo(world, *, back=False):
    shape = (2, 9, 4, 3)
    own = Layout(height=world.size).boxes(world.size, 2, shape[1:])
    rows = [(b[0], type(b[1])(max(0, b[1].start - 1), min(9, b[1].stop + 1)), *b[2:]) for b in own]
    way = Movement(tuple(own), tuple(rows))
    mover = movement.prepare(world.engine, way, np.dtype("f4"), label="halo of conv1", back="gradient of that halo")
    owned, needed = (np.ones([len(range(*side)) for side in boxes[world.rank]], "f4") for boxes in (own, rows))

    def there():
        mover.start(owned)
        mover.finish(owned)

    def again():
        mover.start_back(needed)
        mover.finish_back(needed, owned)

    return again if back else there


def prepared(collective):
    def run():
        collective.start()
        collective.wait()
    return run


def kinds(world):
    comm, engine, size = world.comm, world.engine, world.size
    some = np.ones(30, "f4")
    bounds = [0, 10, 20, 30]
    yield "barrier", 1, "barrier", world.barrier
    yield "broadcast", 0, "broadcast", lambda: world.broadcast_obj("x")
    yield "gather", 1, "gather", lambda: world.gather_obj("x")
    yield "agree", 1, "agreement", world.agree
    yield "compare", 1, "comparison", lambda: world.compare({"plan": "x"})
    for name in ("butterfly", "ring"):
        yield name, 1, "sum of x", lambda name=name: collectives.allreduce(comm, some, name, label="sum of x")
    for name in ("ring", "mpi"):
        one = persistent.prepare_allreduce(engine, some, name, label=f"sum of fc8 by {name}")
        yield f"prepared {name}", 2, f"sum of fc8 by {name}", prepared(one)
    one = persistent.prepare_reduce_scatter(engine, some, bounds, "pairwise", label="slices")
    yield "reduce-scatter", 0, "slices", prepared(one)
    one = persistent.prepare_allgather(engine, some, bounds, "ring", label="parameters")
    yield "all-gather", 1, "parameters", prepared(one)
    one = persistent.prepare_alltoall(engine, np.ones(2 * 3 * size, "f4"), [[3] * size] * size, label="factors")
    yield "all-to-all", 1, "factors", prepared(one)
    yield "halo", 1, "halo of conv1", halo(world)
    yield "halo back", 1, "gradient of that halo", halo(world, back=True)


def main():
    world, said = start(), []
    world.engine.watch(world.watchdog)
    world.watchdog._end = said.append
    results = {}
    for name, culprit, label, join in kinds(world):
        world.watchdog.timeout_s = 0.0
        world.barrier()
        said.clear()
        world.watchdog.timeout_s = TIMEOUT_S
        if world.rank == culprit:
            time.sleep(ABSENT_S)
        join()
        world.barrier()  # who is through waits here, and answers from here
        world.watchdog.timeout_s = 0.0
        everyone = world.gather_obj(list(said))
        if world.rank == 0:
            results[name] = [culprit, label, [line for lines in everyone for line in lines]]
    if world.rank == 0:
        json.dump(results, open("results.json", "w"))
    return 0


sys.exit(run_and_exit(main))
"""

KINDS = [
    *("barrier", "broadcast", "gather", "agree", "compare", "butterfly", "ring"),
    *("prepared ring", "prepared mpi", "reduce-scatter", "all-gather", "all-to-all", "halo", "halo back"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[int, str, list[str]]]:
    folder = tmp_path_factory.mktemp("job")
    script: Path = folder / "job.py"
    script.write_text(DRIVER)
    result = launch(3, script, cwd=folder, timeout=120, env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_rank_that_stays_away_is_named_with_what_it_has_not_joined(results, kind: str) -> None:
    culprit, label, lines = results[kind]
    assert lines, "nobody noticed"
    assert re.match(rf"rank {culprit} \(host [^)]+\) has not joined '{re.escape(label)}' for \d+ s, in which", lines[0])


def test_no_kind_is_left_out(results) -> None:
    assert KINDS == list(results)
