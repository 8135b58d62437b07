"""What a study consists of, and what of it is run again."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import sys
import tomllib
from pathlib import Path

import pytest

from hpcnn import configuration
from hpcnn.analysis import scaling_point
from hpcnn.analysis.forecast import forecast, model_of
from hpcnn.analysis.jobs import Launcher
from hpcnn.analysis.scaling import Study, prepare
from hpcnn.analysis.scaling_point import FAILURE, LOCK, POINTS, SETTINGS, status
from hpcnn.errors import ConfigError, PlanError
from hpcnn.plan import machine, planner
from hpcnn.plan.site import Site
from tests.studies import finish

STUDY = Study(source="lenet5", ranks=(1, 2), repeats=1, steps=4)
STEPS = (9.0, 9.0, 1.0, 2.0)


def settings(folder: Path, name: str) -> dict:
    return tomllib.loads((folder / POINTS / name / SETTINGS).read_text())


def test_a_study_is_the_product_of_what_it_compares_with_one_run_on_one_rank() -> None:
    study = dataclasses.replace(
        STUDY, ranks=(4, 2, 1, 2), plans=("data", "hybrid"), exchanges=("allreduce", "sharded"), algorithms=("ring",),
        repeats=2,
    )  # fmt: skip
    points = [point for point, _ in study.points(study.base())]
    assert 2 * (1 + 2 * 4) == len(points)
    assert [1] * 9 + [2] * 9 == [point.repeat for point in points]  # each once before any a second time
    assert "strong-data-allreduce-auto-1-1" == points[0].name
    assert [
        "strong-data-allreduce-ring-2-1",
        "strong-data-sharded-ring-2-1",
        "strong-hybrid-allreduce-ring-2-1",
        "strong-hybrid-sharded-ring-2-1",
    ] == [point.name for point in points[1:5]]


def test_the_batch_stays_in_strong_scaling_and_grows_with_the_ranks_in_weak(tmp_path: Path) -> None:
    study = dataclasses.replace(STUDY, overrides=("train.global_batch=8", "data.source=synthetic"), ranks=(1, 200))
    weak = dataclasses.replace(study, mode="weak")
    sizes = [[c.train.global_batch for _, c in one.points(one.base())] for one in (study, weak)]
    assert [[8, 8], [8, 1600]] == sizes
    assert [1024, 1600] == [c.data.num_samples for _, c in weak.points(weak.base())]  # no epoch without a whole batch


def test_runs_make_their_steps_without_saving_or_evaluating(tmp_path: Path) -> None:
    data = tmp_path / "images"
    data.mkdir()
    study = dataclasses.replace(STUDY, algorithms=("ring",), overrides=(f"data.source={data}", "train.lr=0.01"))
    prepare(study, tmp_path / "s")
    tree = settings(tmp_path / "s", "strong-data-allreduce-ring-2-1")
    assert (4, 0.01, "ring") == (tree["train"]["steps"], tree["train"]["lr"], tree["exchange"]["algorithm"])
    assert {"every_epochs": 0, "every_steps": 0, "final": False}.items() <= tree["checkpoint"].items()
    assert tree["log"]["evaluate_every_epochs"] == 0
    assert configuration.from_toml(
        (tmp_path / "s" / POINTS / "strong-data-allreduce-ring-2-1" / SETTINGS).read_text(), "x"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overrides": ("train.steps=7",)}, "train.steps would be overruled; give --steps"),
        ({"overrides": ("plan.preset=data",)}, "give --plans"),
        ({"plans": ("dta",)}, r"'plan.preset' \(='dta'\)"),
        ({"algorithms": ("rong",)}, r"'exchange.algorithm' \(='rong'\)"),
        ({"exchanges": ("sum",)}, r"'exchange.kind' \(='sum'\)"),
        ({"source": "lenet6"}, "'lenet6' is neither a preset nor a file"),
        ({"plans": ("a/p.toml", "b/p.toml"), "ranks": (2,)}, "would share the name"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    change: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.toml").touch()
    with pytest.raises(ConfigError, match=message):
        prepare(dataclasses.replace(STUDY, **change), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_missing_file_of_a_plan_or_machine_is_named(tmp_path: Path) -> None:
    for change in ({"plans": (f"{tmp_path}/p-{{ranks}}.toml",)}, {"machine": f"{tmp_path}/p-{{ranks}}.toml"}):
        with pytest.raises(PlanError, match=r"cannot read '.*/p-2.toml'"):
            prepare(dataclasses.replace(STUDY, **change, ranks=(2,)), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_saved_plans_of_each_number_of_ranks_are_one_contender(tmp_path: Path) -> None:
    base = configuration.load("lenet5")
    model = model_of(base)
    for ranks in (2, 4):
        text = planner.to_toml(planner.make_plan(model, "hybrid", ranks, base.train.global_batch))
        (tmp_path / f"cut-{ranks}.toml").write_text(text)
    study = dataclasses.replace(STUDY, plans=(f"{tmp_path}/cut-{{ranks}}.toml",), ranks=(1, 2, 4))
    serial, *others = prepare(study, tmp_path / "s")
    assert ("data", "strong-data-allreduce-auto-1-1") == (serial.plan, serial.name)
    assert 1 == len({point.plan for point in others})
    for point in others:
        text = (tmp_path / "s" / POINTS / point.name / scaling_point.PLAN).read_text()
        assert point.ranks == tomllib.loads(text)["ranks"]
    assert "strong-cut-allreduce-butterfly-4-1" == others[1].name


def test_predictions_are_those_of_the_plan_command_for_the_machine_of_each_number_of_ranks(tmp_path: Path) -> None:
    slow = dataclasses.replace(machine.DEFAULT_NETWORK, beta_s_per_byte=1e-7)
    for ranks, link in ((1, machine.DEFAULT_NETWORK), (2, slow)):
        measured = machine.Measured(hosts=ranks, ranks=ranks, cores=1, mpi="none")
        text = machine.to_toml(dataclasses.replace(machine.DEFAULT, network=link, measured=measured))
        (tmp_path / f"m-{ranks}.toml").write_text(text)
    study = dataclasses.replace(STUDY, plans=("data", "auto"), machine=f"{tmp_path}/m-{{ranks}}.toml")
    points = prepare(study, tmp_path / "s")
    for point in points:
        tree = settings(tmp_path / "s", point.name)
        assert str(tmp_path / f"m-{point.ranks}.toml") == tree["exchange"]["machine"]
        settled = configuration.from_tree(tree)
        site = Site.of(settled, machine.load(tree["exchange"]["machine"]), tuple(range(point.ranks)))
        assert forecast(settled, model_of(settled), site).prediction.step_s == point.predicted_step_s
        found = tmp_path / "s" / POINTS / point.name / scaling_point.PLAN
        assert found.exists() == (point.plan == "auto")  # what was found is what is run
    _, data, auto = points
    assert auto.predicted_step_s <= data.predicted_step_s
    assert [None, None] == [point.predicted_step_s for point in prepare(STUDY, tmp_path / "t")]


def test_only_all_steps_by_all_ranks_make_a_point_finished(tmp_path: Path) -> None:
    _, point = prepare(STUDY, tmp_path)
    home = tmp_path / POINTS / point.name
    assert ("pending", "") == status(home)
    (home / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert "pending" == status(home)[0]
    finish(tmp_path, point, STEPS, stopped="SIGTERM")
    assert "pending" == status(home)[0]
    finish(tmp_path, point, STEPS[:3])
    assert "pending" == status(home)[0]
    finish(tmp_path, point, STEPS, ranks=1)
    assert "pending" == status(home)[0]
    finish(tmp_path, point, STEPS)
    assert ("finished", "") == status(home)
    (home / FAILURE).write_text("exit status 1: it broke\n")
    assert ("failed", "exit status 1: it broke") == status(home)


def test_finished_points_stay_and_other_settings_for_them_are_refused(tmp_path: Path) -> None:
    point, other = prepare(STUDY, tmp_path)
    finish(tmp_path, point, STEPS)
    longer = dataclasses.replace(STUDY, overrides=("train.lr=0.2",))
    with pytest.raises(ConfigError, match=r"auto-1-1' has train.lr = 0.05, and now it is 0.2"):
        prepare(longer, tmp_path)
    assert 0.05 == settings(tmp_path, other.name)["train"]["lr"]  # nothing was written
    with pytest.raises(ConfigError, match=r"is a study of lenet5 with train.global_batch 64, and now it is vgg11"):
        prepare(dataclasses.replace(STUDY, source="vgg11"), tmp_path)
    assert [point, other] == prepare(STUDY, tmp_path)[:2]
    assert "finished" == status(tmp_path / POINTS / point.name)[0]
    assert 4 == len(prepare(dataclasses.replace(STUDY, repeats=2), tmp_path))  # more of the same may come
    (tmp_path / POINTS / point.name / "metrics.jsonl").unlink()
    prepare(longer, tmp_path)
    assert 0.2 == settings(tmp_path, other.name)["train"]["lr"]


def fake(script: str) -> Launcher:
    """Return a launcher that runs a Python script in place of the job; its last argument is the point's folder."""
    whole = f"import pathlib, sys\nhome = pathlib.Path(sys.argv[-1])\n{script}"
    return Launcher((sys.executable, "-c", whole.replace("{", "{{").replace("}", "}}")))


def test_a_failed_point_tells_why_and_its_next_run_starts_afresh(tmp_path: Path) -> None:
    _, point = prepare(STUDY, tmp_path)
    home = tmp_path / POINTS / point.name
    broken = "(home / 'checkpoints').mkdir()\n(home / 'rest').touch()\nsys.exit('hpcnn: error: comm: no route.')"
    assert ("failed", "exit status 1: comm: no route.") == scaling_point.run(home, fake(broken), 20.0)
    assert ("failed", "exit status 1: comm: no route.") == status(home)
    assert not (home / "checkpoints").exists()
    assert scaling_point.run(home, fake("print('nothing done')"), 20.0)[1].endswith("were made: nothing done")
    assert not (home / "rest").exists()
    single = "(home / 'plan.toml').write_text('ranks = 1')"
    assert "a job of 1 rank(s), not 2" in scaling_point.run(home, fake(single), 20.0)[1]
    record = json.dumps({"event": "end", "step": 4, "stopped": ""})
    good = f"(home / 'plan.toml').write_text('ranks = 2'); (home / 'metrics.jsonl').write_text({record!r})"
    assert ("finished", "") == scaling_point.run(home, fake(f"{good}; (home / 'final.h5').touch()"), 20.0)
    assert not (home / "final.h5").exists()
    assert not (home / FAILURE).exists()
    assert ("finished", "") == scaling_point.run(home, fake("sys.exit(1)"), 20.0)  # not run again


def test_a_point_that_another_process_runs_is_left_to_it(tmp_path: Path) -> None:
    _, point = prepare(STUDY, tmp_path)
    home = tmp_path / POINTS / point.name
    with (home / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ("running", "") == status(home) == scaling_point.run(home, fake("sys.exit(1)"), 20.0)
    assert "pending" == status(home)[0]
