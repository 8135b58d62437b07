"""The layers of a run: how the plan splits each, what it holds, and the time that was predicted and traced."""

from __future__ import annotations

from typing import Any, NamedTuple

from hpcnn import bounded
from hpcnn.config import Config
from hpcnn.errors import HpcnnError
from hpcnn.nn import models
from hpcnn.plan import costs, planner
from hpcnn.plan.exchanges import buckets_of
from hpcnn.plan.machine import DEFAULT
from hpcnn.plan.planner import AXES, Plan
from hpcnn.plan.prediction import Prediction, predict
from hpcnn.plan.site import Site
from hpcnn.report.run import Run
from hpcnn.report.traced import LayerTime
from hpcnn.report.untrusted import clean
from hpcnn.spec import ModelSpec
from hpcnn.train.groups import config_of_group, count_groups

MOST_RANKS = 256
"""Steps of more ranks are not predicted here: that takes longer than reading the page."""


class LayerRow(NamedTuple):
    """One line of the table; None for what is not known."""

    name: str
    layout: str
    kind: str | None
    output: str | None
    num_parameters: int | None
    """On rank 0."""
    predicted_compute_s: float | None
    predicted_wait_s: float | None
    sent_bytes: int | None
    """In a step, by the busiest rank."""
    traced: LayerTime | None


class Layers(NamedTuple):
    """The table, the step as it was predicted, and what a reader should know of both."""

    rows: list[LayerRow]
    model: ModelSpec | None
    prediction: Prediction | None
    notes: list[str]


def layers_of(run: Run) -> Layers:
    """Return the layers of a run, with as much as its files tell."""
    notes: list[str] = []
    traced = run.trace.layer_times() if run.trace else {}
    model: ModelSpec | None = None
    prediction: Prediction | None = None
    costs_of: dict[str, costs.LayerCost] = {}
    try:
        model = _model(run)
        if (run.num_ranks or 0) > MOST_RANKS:
            notes.append(f"Steps of more than {MOST_RANKS} ranks are not predicted here; `hpcnn plan` does it.")
        elif model and run.config and run.plan_text and run.num_ranks:
            groups = count_groups(run.config, run.num_ranks)
            config = config_of_group(run.config, groups)
            plan = planner.from_toml(run.plan_text, model, config.train.global_batch, run.num_ranks)
            costs_of = {cost.name: cost for cost in costs.layer_costs(model, plan)}
            prediction = _predict(config, run, model, plan, notes)
            if groups > 1:
                notes.append(f"The plan is that of one of {groups} groups of ranks; averages are not predicted.")
    except (HpcnnError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        notes.append(f"The plan does not fit the model, sizes and predictions are left out: {clean(error)}")
        costs_of, prediction = {}, None
    times = {} if prediction is None else {time.name: time for time in prediction.layers}
    rows = []
    for name, layout in _layouts(run.plan_text or "", notes):
        cost, time = costs_of.get(name), times.get(name)
        rows.append(
            LayerRow(
                name=name,
                layout=layout,
                kind=cost.kind if cost else None,
                output=" x ".join(map(str, cost.output_shape)) if cost else None,
                num_parameters=cost.num_parameters if cost else None,
                predicted_compute_s=time.compute_s if time else None,
                predicted_wait_s=time.exposed_s if time else None,
                sent_bytes=time.num_bytes if time else None,
                traced=traced.get(name),
            )
        )
    return Layers(rows, model, prediction, notes)


def _model(run: Run) -> ModelSpec | None:
    """Return the model that was trained, if the run says for which images."""
    shape, num_classes = run.fact("data", "image_shape"), run.fact("data", "num_classes")
    if run.config is None or not isinstance(shape, list) or not isinstance(num_classes, int):
        return None
    height, width, channels = (int(size) for size in shape)
    return models.configured(run.config.model, (height, width, channels), num_classes)


def _predict(config: Config, run: Run, model: ModelSpec, plan: Plan, notes: list[str]) -> Prediction | None:
    nodes = run.fact("nodes")
    if config.device == "cuda" and run.machine is DEFAULT:
        notes.append("Nothing is predicted: that needs a machine file of these GPUs (`hpcnn profile`).")
        return None
    if not isinstance(nodes, list) or len(nodes) != plan.ranks or not all(isinstance(node, int) for node in nodes):
        nodes = list(range(plan.ranks))
    if run.machine is DEFAULT:
        notes.append(
            "Predicted for an ordinary CPU cluster, not for this machine: measure it with `hpcnn profile` and set"
            " exchange.machine."
        )
    site = Site.of(config, run.machine, tuple(nodes))
    return predict(model, plan, buckets_of(config, model, plan, site), site)


def _layouts(plan_text: str, notes: list[str]) -> list[tuple[str, str]]:
    """Return the name and layout of every layer in a plan file: ("conv1", "data, sample 4")."""
    try:
        tables = bounded.toml(plan_text).get("layer", [])
        return [(clean(table["name"]), _layout(table)) for table in tables]
    except (KeyError, TypeError, ValueError, AttributeError):
        notes.append("plan.toml is not a plan: layers are not shown.")
        return []


def _layout(table: dict[str, Any]) -> str:
    cut = [f"{axis} {table[axis]}" for axis in AXES if table.get(axis, 1) != 1]
    marks = [word for word in ("fused", "settle") if table.get(word) is True]
    turns = [f"turns {table['turns']}"] if "turns" in table else []
    return clean(", ".join([str(table.get("layout", "")), *cut, *marks, *turns]))
