"""From a model, a batch and a number of ranks to one layout per layer."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass

from hpcnn.errors import PlanError
from hpcnn.plan.layout import Layout
from hpcnn.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout for every layer, in the model's order."""

    model: str
    ranks: int
    global_batch: int
    layouts: tuple[tuple[str, Layout], ...]

    @property
    def input_layout(self) -> Layout:
        """Layout in which the images enter: that of the first layer."""
        return self.layouts[0][1]


def make_plan(model: ModelSpec, preset: str, ranks: int, global_batch: int) -> Plan:
    """Return the plan of a preset.

    Parameters
    ----------
    preset : str
        "data": every layer keeps all its weights on every rank and computes the rank's share of the batch.

    Raises
    ------
    PlanError
        If the preset is unknown or the batch has fewer samples than there are ranks.
    """
    if preset != "data":
        raise PlanError(f"plan: preset (={preset!r}) is unknown; this version has 'data'.")
    if global_batch < ranks:
        raise PlanError(
            f"plan: train.global_batch (={global_batch}) is smaller than the number of ranks (={ranks});"
            f" each rank needs at least one sample. Use at most {global_batch} ranks or a larger batch."
        )
    layout = Layout(sample=ranks)
    return Plan(
        model=model.name,
        ranks=ranks,
        global_batch=global_batch,
        layouts=tuple((layer.name, layout) for layer in model.layers),
    )


def to_toml(plan: Plan) -> str:
    """Return the plan as TOML, one table a layer, that a person can read and `from_toml` reads back."""
    lines = [f'model = "{plan.model}"', f"ranks = {plan.ranks}", f"global_batch = {plan.global_batch}"]
    for name, layout in plan.layouts:
        lines += ["", "[[layer]]", f'name = "{name}"', f'layout = "{layout.name}"', f"sample = {layout.sample}"]
    return "\n".join(lines) + "\n"


def from_toml(text: str, model: ModelSpec, global_batch: int) -> Plan:
    """Return the plan in a TOML text, checked against the model and batch it is to serve.

    Raises
    ------
    PlanError
        If the text is no plan, is for another batch, names other layers than the model, or asks for a layout that is
        not supported.
    """
    try:
        tree = tomllib.loads(text)
        ranks, batch, tables = int(tree["ranks"]), int(tree["global_batch"]), tree["layer"]
        found = [(str(table["name"]), str(table["layout"]), int(table["sample"])) for table in tables]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"plan: not a plan file ({error}); write one with `hpcnn plan CONFIG --ranks N --save FILE`."
        ) from None
    if batch != global_batch:
        raise PlanError(
            f"plan: global_batch (={batch}) differs from train.global_batch (={global_batch}); both must be equal."
            " Save a new plan, or change the setting."
        )
    expected = [layer.name for layer in model.layers]
    if [name for name, _, _ in found] != expected:
        raise PlanError(f"plan: its layers are not those of model '{model.name}'. Save a new plan for this model.")
    for name, kind, sample in found:
        if kind != "data" or sample != ranks:
            raise PlanError(
                f"plan: layer '{name}': layout (={kind!r} over {sample}) is not supported; this version runs"
                f" layout 'data' over all {ranks} ranks."
            )
    return make_plan(model, "data", ranks, batch)
