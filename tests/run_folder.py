"""Run folders with known numbers, written without training anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpcnn import configuration
from hpcnn.nn import models
from hpcnn.plan import planner
from hpcnn.report import trace
from hpcnn.report.trace import RankSpans
from hpcnn.timeline import Span

NUM_RANKS = 2


def step_record(step: int, **fields) -> dict:
    """Return the record of a step whose times depend on its number."""
    step_s = 0.010 + 0.001 * (step % 3)
    exposed_s, input_s = 0.002 + 0.0005 * (step % 2), 0.0001 * step
    known = {
        "event": "step",
        "step": step,
        "epoch": 1,
        "loss": 2.0 / step,
        "accuracy": 1 - 1.0 / step,
        "images_per_second": 64 / step_s,
        "lr": 0.1,
        "step_s": step_s,
        "compute_s": step_s - exposed_s - input_s,
        "exposed_comm_s": exposed_s,
        "hidden_comm_s": 0.001,
        "input_wait_s": input_s,
        "bytes_sent": 1000,
        "messages_sent": 4,
    }
    return known | fields


def spans_of(rank: int, num_steps: int = 3) -> RankSpans:
    """Return the spans of a rank: 10 ms a step, of which 4 + rank computing, 3 waiting, the rest between."""
    spans = []
    for step in range(1, num_steps + 1):
        begin = 0.010 * step
        middle = begin + 0.001
        spans += [
            Span(f"step {step}", "step", begin, begin + 0.010, {}),
            Span("conv1 forward", "compute", middle, middle + 0.001, {}),
            Span("wait for gradients of conv1", "wait", middle + 0.001, middle + 0.003, {}),
            Span("wait for images", "wait", middle + 0.003, middle + 0.004, {}),
            Span("conv1 error", "compute", middle + 0.004, middle + 0.005, {}),
            Span("conv1 weight gradient", "compute", middle + 0.005, middle + 0.006 + 0.001 * rank, {}),
            Span("update", "compute", middle + 0.008, middle + 0.009 - 1e-9, {}),
            Span("gradient sum of conv1", "communication", middle, middle + 0.005, {"bytes": 500 + rank}),
        ]
    ahead_s = 100.0 * rank
    own = [span._replace(begin_s=span.begin_s - ahead_s, end_s=span.end_s - ahead_s) for span in spans]
    return RankSpans(f"node{rank}", ahead_s, own, 0)


def write_run(
    folder: Path,
    *,
    num_steps: int = 8,
    records: Iterable[dict] | None = None,
    ended: bool = True,
    traced: bool = True,
    host: str = "node0",
    overrides: Sequence[str] = (),
    extra: str = "",
) -> Path:
    """Write a run of LeNet-5 on two ranks, of `num_steps` steps or with these `records`, and return its folder."""
    folder.mkdir(parents=True)
    config = configuration.load("lenet5", ["train.global_batch=64", *overrides])
    (folder / "config.toml").write_text(configuration.to_toml(config))
    model = models.configured(config.model, (28, 28, 1), 10)
    (folder / "plan.toml").write_text(planner.to_toml(planner.make_plan(model, config.plan.preset, NUM_RANKS, 64)))
    lines = [step_record(step) for step in range(1, num_steps + 1)] if records is None else list(records)
    if ended:
        lines.append({"event": "epoch", "step": num_steps, "epoch": 1, "test_accuracy": 0.75, "test_loss": 0.5})
        lines.append({"event": "end", "step": num_steps, "stopped": "", "peak_memory_bytes": 123_000_000})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + extra)
    facts = {
        "command": ["hpcnn", "train", "lenet5"],
        "hosts": [{"host": host, "ranks": NUM_RANKS, "threads": 2, "cores": 2}],
        "nodes": [0, 0],
        "mpi": "MPICH 9.9.9",
        "data": {"image_shape": [28, 28, 1], "num_classes": 10},
        "operators": {"implementation": "onednn"},
    }
    (folder / "environment.json").write_text(json.dumps(facts))
    if traced:
        trace.write(folder / "trace.json", [spans_of(rank) for rank in range(NUM_RANKS)])
    return folder
