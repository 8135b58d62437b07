"""From a model, a batch and a number of ranks to one layout per layer: presets, and plans in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt
from typing import Any

from hpcnn import bounded
from hpcnn.arrays import Pair
from hpcnn.errors import PlanError
from hpcnn.plan import placement
from hpcnn.plan import turns as groups_in_turns
from hpcnn.plan.layout import Layout
from hpcnn.plan.parts import part
from hpcnn.plan.placement import Placement
from hpcnn.plan.turns import GroupSpec
from hpcnn.spec import (
    ConvSpec,
    FlattenSpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    Part,
)

MOST_RANKS = 1 << 20
"""Of a plan in a file that comes without ranks."""
AXES = ("sample", "height", "width", "channel", "inner")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout for every layer, in the model's order.

    `fused` names the layers that read what their rank has computed, borders included, instead of fetching the borders;
    `settled` those of them whose gradients of these borders are sent to the owners: backward computes no border below.
    `exchange` says of layers by what kind of exchange their gradients travel; others follow `exchange.kind`.
    `turns` names the last layers of groups that are computed tile after tile, with the rows and columns of tiles; a
    group reaches towards the images as far as its layers are fused.
    """

    model: str
    ranks: int
    global_batch: int
    layouts: tuple[tuple[str, Layout], ...]
    fused: frozenset[str] = frozenset()
    settled: frozenset[str] = frozenset()
    exchange: tuple[tuple[str, str], ...] = ()
    turns: tuple[tuple[str, Pair], ...] = ()

    @property
    def cut(self) -> dict[str, int]:
        """Into how many parts each layer's parameters are cut; their replicas lie that many ranks apart."""
        return {name: layout.cut for name, layout in self.layouts}

    def parts(self, model: ModelSpec, rank: int) -> list[Part]:
        """Return what `rank` has of every layer."""
        placed = self.place(model, self.ranks).layers  # enough samples that nobody goes without
        layouts = dict(self.layouts)
        return [part(layer, layouts[layer.name], placed[layer.name].partial[rank], rank) for layer in model.layers]

    def groups(self, model: ModelSpec) -> tuple[GroupSpec, ...]:
        """Return the groups of layers that are computed in turns; PlanError if one cannot be."""
        return groups_in_turns.groups(model, dict(self.layouts), self.fused, self.turns)

    def place(self, model: ModelSpec, num_samples: int) -> Placement:
        """Return what each rank owns, computes and reads of a batch of `num_samples`; PlanError if it cannot be."""
        return _placed(model, self.layouts, self.fused, self.settled, self.ranks, num_samples)


@lru_cache(maxsize=8)  # the same few are asked for again and again, and large ones take seconds
def _placed(
    model: ModelSpec,
    layouts: tuple[tuple[str, Layout], ...],
    fused: frozenset[str],
    settled: frozenset[str],
    ranks: int,
    num_samples: int,
) -> Placement:
    return placement.place(model, dict(layouts), fused, ranks, num_samples, settled=settled)


def make_plan(model: ModelSpec, preset: str, ranks: int, global_batch: int) -> Plan:
    """Return the plan of a preset.

    Parameters
    ----------
    preset : str
        "data": every layer keeps all its weights on every rank and computes the rank's share of the batch.
        "hybrid": so do convolutions; fully connected layers are cut by output features and see the whole batch.
        "hybrid-rows": as "hybrid", but a fully connected layer whose input lies cut by features already sums over them
        as they lie, and fetches none, unless it has more outputs than inputs.
        "model": all layers with filters or output features are cut along them, and see the whole batch.
        "spatial": images and feature maps are cut into tiles, what has no rows and columns by samples.
        "tiled-groups": as "spatial", but ranks compute the borders of their tiles themselves, from one pooling layer to
        the next, and fetch them only there.

    Raises
    ------
    PlanError
        If the preset is unknown, or cannot split this model or batch.

    References
    ----------
    "hybrid": Jin, Qamar, Zheng, Ahmad, JIFS 35 (5), 2018. "hybrid-rows": Shoeybi, Patwary, Puri, LeGresley, Casper,
    Catanzaro, arXiv:1909.08053. "tiled-groups": Rama, Threadgill, Gerstlauer, arXiv:2409.09083.
    """
    if preset not in PRESETS:
        known = ", ".join(f"'{name}'" for name in PRESETS)
        raise PlanError(f"plan: preset (={preset!r}) is unknown; this version has {known}.")
    if preset in ("data", "hybrid", "hybrid-rows") and global_batch < ranks:
        raise PlanError(
            f"plan: train.global_batch (={global_batch}) is smaller than the number of ranks (={ranks});"
            f" each rank needs at least one sample. Use at most {global_batch} ranks or a larger batch."
        )
    layouts = dict(zip((layer.name for layer in model.layers), PRESETS[preset](model, ranks), strict=True))
    return checked(
        Plan(
            model=model.name,
            ranks=ranks,
            global_batch=global_batch,
            layouts=tuple(layouts.items()),
            fused=_fused_between_pools(model, layouts) if preset == "tiled-groups" else frozenset(),
        ),
        model,
    )


def checked(plan: Plan, model: ModelSpec) -> Plan:
    """Return a plan that can be run, or raise PlanError naming the layer and the reason."""
    groups, placed = plan.groups(model), plan.place(model, plan.global_batch).layers
    for layer in (layer for group in groups for layer in group.layers):
        if placed[layer.name].returned != placed[layer.name].computed:
            raise PlanError(
                f"plan: layer '{layer.name}' is computed in turns, whose backward goes over all that forward made, and"
                " a layer above settles. Set settle = false there, or end the turns above it."
            )
    return plan


def in_turns(plan: Plan, model: ModelSpec, turns: Pair) -> Plan:
    """Return a plan in which the layers that follow the images are groups of so many turns, one up to each pooling.

    Of (1, 1) turns nothing is made.

    Raises
    ------
    PlanError
        If there is no group of two layers.
    """
    if turns == (1, 1):
        return plan
    chains = groups_in_turns.chains_from_images(model, dict(plan.layouts), turns)
    if not chains:
        raise PlanError(
            f"plan: turns (={list(turns)}) need two convolutions, poolings or activations that follow the images one"
            f" after the other; model '{model.name}' does not begin so. Set plan.turns = [1, 1], or give turns to other"
            " layers in a plan file."
        )
    inner = {name for chain in chains for name in chain[1:]}
    last_layers = tuple((chain[-1], turns) for chain in chains)
    return checked(replace(plan, fused=plan.fused | inner, turns=last_layers), model)


def _data(model: ModelSpec, ranks: int) -> list[Layout]:
    return [Layout(sample=ranks)] * len(model.layers)


def _hybrid(model: ModelSpec, ranks: int) -> list[Layout]:
    """Return "data" up to the first fully connected layer, "model" from there on."""
    linear = [isinstance(layer, LinearSpec) for layer in model.layers]
    first = linear.index(True) if True in linear else len(linear)
    return _data(model, ranks)[:first] + [_by_channel(layer, ranks) for layer in model.layers[first:]]


def _hybrid_rows(model: ModelSpec, ranks: int) -> list[Layout]:
    """Return "hybrid", with partial sums over features where these are cut as they are to be read."""
    layouts: dict[str, Layout] = {}
    for layer, layout in zip(model.layers, _hybrid(model, ranks), strict=True):
        by_feature = all(source in layouts and layouts[source].cut > 1 for source in layer.inputs)
        narrows = layer.output_shape[-1] <= layer.input_shape[-1]  # more sums would travel than features
        rows = isinstance(layer, LinearSpec) and by_feature and narrows and layer.input_shape[-1] >= ranks
        layouts[layer.name] = Layout(inner=ranks) if rows else layout
    return list(layouts.values())


def _model(model: ModelSpec, ranks: int) -> list[Layout]:
    return [_by_channel(layer, ranks) for layer in model.layers]


def _spatial(model: ModelSpec, ranks: int) -> list[Layout]:
    return [_by_tile(layer, ranks) for layer in model.layers]


def _by_channel(layer: LayerSpec, ranks: int) -> Layout:
    grouped = isinstance(layer, ConvSpec) and layer.groups > 1
    if isinstance(layer, FlattenSpec) or grouped or layer.output_shape[-1] < ranks:
        return Layout(sample=ranks)
    return Layout(channel=ranks)


def _by_tile(layer: LayerSpec, ranks: int) -> Layout:
    shape = layer.output_shape
    width = next(parts for parts in range(isqrt(ranks), 0, -1) if ranks % parts == 0)
    height = ranks // width
    if len(shape) < 3 or shape[0] < height or shape[1] < width:
        return Layout(sample=ranks)
    return Layout(height=height, width=width)


PRESETS: dict[str, Callable[[ModelSpec, int], list[Layout]]] = {
    "data": _data,
    "hybrid": _hybrid,
    "hybrid-rows": _hybrid_rows,
    "model": _model,
    "spatial": _spatial,
    "tiled-groups": _spatial,
}


def _fused_between_pools(model: ModelSpec, layouts: Mapping[str, Layout]) -> frozenset[str]:
    """Return the tiled layers that read convolutions in the same tiles."""
    makes = {layer.name: layer for layer in model.layers}
    fused = set()
    for layer in model.layers:
        alike = all(layouts.get(source) == layouts[layer.name] for source in layer.inputs)
        if alike and all(isinstance(makes[source], ConvSpec) for source in layer.inputs):
            fused.add(layer.name)
    return frozenset(fused)


def to_toml(plan: Plan) -> str:
    """Return the plan as TOML, one table a layer, that a person can read and `from_toml` reads back."""
    lines = [f'model = "{plan.model}"', f"ranks = {plan.ranks}", f"global_batch = {plan.global_batch}"]
    for name, layout in plan.layouts:
        lines += ["", "[[layer]]", f'name = "{name}"', f'layout = "{layout.name}"']
        lines += [f"{axis} = {getattr(layout, axis)}" for axis in AXES if axis == "sample" or getattr(layout, axis) > 1]
        lines += ["fused = true"] if name in plan.fused else []
        lines += ["settle = true"] if name in plan.settled else []
        lines += [f'exchange = "{kind}"' for layer, kind in plan.exchange if layer == name]
        lines += [f"turns = {list(turns)}" for last, turns in plan.turns if last == name]
    return "\n".join(lines) + "\n"


def from_toml(text: str, model: ModelSpec, global_batch: int, num_ranks: int | None = None) -> Plan:
    """Return the plan in a TOML text, checked against the model, the batch and the ranks, if known, it is to serve.

    Of a layer, `sample`, `height`, `width`, `channel` and `inner` count (1 where they are left out), `fused`, `settle`,
    `exchange` and `turns`; the word `layout` is for people. `turns = [rows, columns]` stands at the last layer of a
    group that every rank computes tile after tile, to hold the feature maps of one tile at a time. To the group belong
    this layer, what it reads if it is fused, what that reads if that is fused, and so on: `fused = true` joins a layer
    to the one that it reads. The group ends where a layer is not fused, reads the images, or reads the last layer of
    another group.

    Raises
    ------
    PlanError
        If the text is no plan, is for another batch, names other layers than the model, or asks for what cannot be run.
    """
    try:
        tree = bounded.toml(text)
        ranks, batch, tables = int(tree["ranks"]), int(tree["global_batch"]), tree["layer"]
        layouts = tuple((str(table["name"]), _layout(table)) for table in tables)
        fused, settled = (
            frozenset(str(table["name"]) for table in tables if table.get(flag, False) is True)
            for flag in ("fused", "settle")
        )
        exchange = tuple((str(table["name"]), str(table["exchange"])) for table in tables if "exchange" in table)
        turns = tuple((str(table["name"]), _turns(table)) for table in tables if "turns" in table)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise PlanError(
            f"plan: not a plan file ({error}); write one with `hpcnn plan CONFIG --ranks N --save FILE`."
        ) from None
    if ranks != (num_ranks or min(max(ranks, 1), MOST_RANKS)):  # before ranks are counted up one by one
        known = f"there are {num_ranks}; both must be equal" if num_ranks else f"a plan is for 1 to {MOST_RANKS}"
        raise PlanError(f"plan: made for {ranks} ranks, and {known}. Save a new plan.")
    if batch != global_batch:
        raise PlanError(
            f"plan: global_batch (={batch}) differs from train.global_batch (={global_batch}); both must be equal."
            " Save a new plan, or change the setting."
        )
    if [name for name, _ in layouts] != [layer.name for layer in model.layers]:
        raise PlanError(f"plan: its layers are not those of model '{model.name}'. Save a new plan for this model.")
    plan = Plan(
        model=model.name,
        ranks=ranks,
        global_batch=batch,
        layouts=layouts,
        fused=fused,
        settled=settled,
        exchange=exchange,
        turns=turns,
    )
    return checked(plan, model)


def _layout(table: dict[str, Any]) -> Layout:
    unknown = set(table) - {"name", "layout", "fused", "settle", "exchange", "turns", *AXES}
    if unknown:
        raise PlanError(
            f"plan: layer '{table['name']}': unknown key {sorted(unknown)[0]!r}; a layer has {', '.join(AXES)}, fused,"
            " settle, exchange, turns."
        )
    return Layout(**{axis: int(table.get(axis, 1)) for axis in AXES})


def _turns(table: dict[str, Any]) -> Pair:
    match table["turns"]:
        case [int(rows), int(columns)] if min(rows, columns) >= 1:
            return rows, columns
    raise PlanError(
        f"plan: layer '{table['name']}': turns (={table['turns']!r}) must be [rows, columns] of tiles, each at least 1."
    )
