"""Each piece of advice appears where its measure says so, and not otherwise."""

from __future__ import annotations

import json

import pytest

from hpcnn.report.advice import advise, describe
from hpcnn.report.layers import layers_of
from hpcnn.report.run import read_run


def steps(compute, exposed=0.0, waiting=0.0, num=60, slow=1.0, **fields):
    return [
        {
            "event": "step",
            "step": step,
            "step_s": (compute + exposed + waiting) * (slow if step % 10 == 0 else 1),
            "compute_s": compute,
            "exposed_comm_s": exposed,
            "input_wait_s": waiting,
            "bytes_sent": 1000,
            **fields,
        }
        for step in range(1, num + 1)
    ]


def advice_for(make_run, records, **options):
    run = read_run(make_run(records=records, **({"traced": False} | options)))
    return advise(run, layers_of(run).model)


def settings(found):
    return [each.setting for each in found]


def test_exposed_communication_of_a_model_with_large_linear_layers(make_run):
    found = advice_for(make_run, steps(0.6, 0.4))
    assert settings(found) == ["plan.preset=hybrid", "exchange.kind=auto", "exchange.machine=machine.toml"]
    assert "40%" in found[0].finding


def test_exposed_communication_without_overlap(make_run):
    assert settings(advice_for(make_run, steps(0.6, 0.4), overrides=["exchange.overlap=false"])) == [
        "exchange.overlap=true"
    ]


def test_exposed_communication_of_a_split_model_is_not_told_to_be_split_again(make_run):
    found = settings(advice_for(make_run, steps(0.6, 0.4), overrides=["plan.preset=hybrid", "exchange.kind=auto"]))
    assert found == ["plan.preset=auto", "exchange.machine=machine.toml"]


def test_waiting_for_images(make_run):
    found = advice_for(make_run, steps(0.88, 0.0, 0.12))
    assert settings(found) == ["data.prefetch=4"]
    assert "12%" in found[0].finding


@pytest.mark.parametrize(("slow", "told"), [(5.0, True), (1.2, False)])
def test_steps_that_vary(make_run, slow, told):
    found = advice_for(make_run, steps(1.0, num=100, slow=slow))
    assert told == any("unsteady" in each.finding for each in found)


def test_ranks_that_compute_unequally_and_time_between_layers(make_run):
    found = advice_for(make_run, steps(1.0), traced=True)
    assert any("rank 1 (node1)" in each.finding and "unequally" in each.finding for each in found)
    # of 20 ms of both ranks 9 compute and 6 wait
    assert any("25%" in each.finding and "between the layers" in each.finding for each in found)


def test_more_threads_than_cores_come_first(make_run):
    folder = make_run(records=steps(0.6, 0.4))
    facts = json.loads((folder / "environment.json").read_text())
    facts["hosts"] = [{"host": "n7", "ranks": 4, "threads": 8, "cores": 4}]
    (folder / "environment.json").write_text(json.dumps(facts))
    first = advise(read_run(folder), None)[0]
    assert "n7: 4 ranks run 8 threads on 4 cores" in first.finding
    assert first.setting == "OMP_NUM_THREADS=1"


def test_a_run_that_hardly_waits_hears_of_more_ranks_only(make_run):
    (only,) = advice_for(make_run, steps(0.99, 0.01))
    assert "More ranks" in only.remedy


def test_the_story_has_the_shares_of_the_second_half(make_run):
    records = steps(0.1, 0.9, num=30) + steps(0.6, 0.3, 0.1, num=30)
    story = describe(read_run(make_run(records=records)))
    assert story.startswith("A step took 1000 ms: 60% computing, 30% waiting for other ranks, 10% waiting for images.")


@pytest.mark.parametrize("hosts", [7, [7], [{"host": "x"}], [{"ranks": "4", "threads": [], "cores": 0}]])
def test_hosts_that_are_nonsense_are_passed_over(make_run, hosts):
    folder = make_run(records=steps(0.99, 0.01), traced=False)
    (folder / "environment.json").write_text(json.dumps({"hosts": hosts}))
    assert len(advise(read_run(folder), None)) == 1
