"""The partitioner: one layout per layer, grouping and exchange, chosen by predicted time.

A model is a chain of units: stretches of layers between which a single value lives, often one layer, and a residual
block as a whole. A dynamic programme goes along the chain and keeps, for every layout a unit may leave its output in,
the cheapest way to get there: computation, what has to be fetched where layouts change, and a part of the time of its
gradients' travel, some of which will hide. Units in the same tiles may be run through as one group, whose
borders are computed redundantly instead of being fetched. Whole plans that come out of it, for several such parts, and
all presets are then played through (`prediction.py`), the best is improved by changing one unit at a time, and the
fastest that fits into memory is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import inf

from hpcnn.config import Config
from hpcnn.errors import PlanError
from hpcnn.plan.buckets import Bucket
from hpcnn.plan.chain import Segment, cost_of_segment, grids, units_of
from hpcnn.plan.exchanges import KINDS, choose_buckets, lazy_rounds
from hpcnn.plan.layout import Layout
from hpcnn.plan.planner import PRESETS, Plan, checked, in_turns, make_plan
from hpcnn.plan.prediction import Prediction, predict
from hpcnn.plan.site import Site
from hpcnn.spec import ModelSpec

EXPOSED_SHARES = (0.0, 0.3, 1.0)
"""Parts of the gradients' time that are counted when layouts are compared."""

MEMORY_PRICES = (1e-10, 1e-9, 1e-8)
"""Seconds that a byte is held to cost where memory is short."""

MOST_CHANGES = 400
"""Plans that are tried to improve the best one."""

PRICE_OF_CHANGE = 1e-3
"""Part of a step that each change of layout along the chain must gain at least: predictions are not that exact, and
plans are read by people."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan, how its gradients travel, and what a step is predicted to take."""

    name: str
    plan: Plan
    kind: str
    prediction: Prediction


@dataclass(frozen=True, kw_only=True)
class Runner:
    """The best that a layer's unit could do otherwise, all else being equal."""

    layer: str
    plan: Plan
    step_s: float
    """By how much a step would take longer; so with the two parts of it."""
    compute_s: float
    exposed_s: float


def plan_for(config: Config, model: ModelSpec, site: Site) -> Plan:
    """Return the plan of a configuration: its preset's, or the fastest there is; with `plan.turns`.

    Raises
    ------
    PlanError
        If it cannot be run, or needs more memory than `plan.memory_bytes`.
    """
    batch, limit = config.train.global_batch, config.plan.memory_bytes
    if config.plan.preset == "auto":
        return in_turns(search_for(config, model, site).plan, model, config.plan.turns)
    plan = in_turns(make_plan(model, config.plan.preset, site.ranks, batch), model, config.plan.turns)
    if limit:
        needed = predict(model, plan, (), site).memory_bytes
        if needed > limit:
            raise PlanError(
                f"plan: preset '{config.plan.preset}' needs about {needed} bytes of arrays on a rank, and"
                f" plan.memory_bytes (={limit}) is less. Start more ranks, take a smaller train.global_batch, set"
                ' plan.preset = "auto", or more plan.turns.'
            )
    return plan


def search_for(config: Config, model: ModelSpec, site: Site) -> Search:
    """Return the search that a configuration's "auto" stands for."""
    return Search(
        model,
        config.train.global_batch,
        site,
        kind=config.exchange.kind,
        bucket_bytes=config.exchange.bucket_bytes,
        memory_bytes=config.plan.memory_bytes,
        every=lazy_rounds(model, config.exchange.lazy_layers, config.exchange.lazy_steps),
    )


class Search:
    """Looks for the fastest plan of a model.

    Parameters
    ----------
    model : ModelSpec
        The layers.
    global_batch : int
        Samples of a step.
    site : Site
        Where it is to run.
    kind : str
        `exchange.kind`; with "auto" the search chooses.
    bucket_bytes : int
        See `exchanges.choose_buckets`.
    memory_bytes : int
        What a rank may use for arrays; 0: no limit.
    every : mapping of str to int
        Layers that are updated once in so many steps.
    """

    def __init__(
        self,
        model: ModelSpec,
        global_batch: int,
        site: Site,
        *,
        kind: str = "allreduce",
        bucket_bytes: int,
        memory_bytes: int = 0,
        every: Mapping[str, int] | None = None,
    ) -> None:
        self._model = model
        self._every = every
        self._batch = global_batch
        self._site = site
        self._kinds = (*KINDS, "auto") if kind == "auto" else (kind,)
        self._chooses_exchange = kind == "auto"
        self._bucket_bytes = bucket_bytes
        self._limit = memory_bytes or inf
        self._seen: dict[tuple[object, ...], Candidate] = {}
        self._segments: dict[tuple[object, ...], Segment | None] = {}
        self.units = units_of(model)
        self._grids = grids(site.ranks, global_batch)

    @cached_property
    def presets(self) -> dict[str, Candidate]:
        """Every preset that can split the model, under its fastest exchange."""
        found = {}
        for preset in PRESETS:
            try:
                plan = make_plan(self._model, preset, self._site.ranks, self._batch)
            except PlanError:
                continue
            found[preset] = self._evaluate(preset, plan)
        return found

    @cached_property
    def best(self) -> Candidate:
        """The fastest plan that fits.

        Raises
        ------
        PlanError
            If nothing fits into the memory, naming what would need least.
        """
        found = [*self.presets.values(), *self._by_programme()]
        best = self._improved(min(found, key=self._rank))
        if best.prediction.memory_bytes > self._limit:
            least = min(one.prediction.memory_bytes for one in self._seen.values())
            raise PlanError(
                f"plan: no plan of '{self._model.name}' for {self._site.ranks} ranks fits into plan.memory_bytes"
                f" (={self._limit}); the smallest needs {least} bytes. Start more ranks, take a smaller"
                " train.global_batch, or raise the limit."
            )
        return best

    @property
    def plan(self) -> Plan:
        """The best plan, with the exchange of every layer where that was left to choose."""
        best = self.best
        if not self._chooses_exchange:
            return best.plan
        kinds = {name: bucket.kind for bucket in self._buckets(best.plan, best.kind) for name in bucket.layers}
        named = tuple((layer.name, kinds[layer.name]) for layer in self._model.layers if layer.name in kinds)
        return replace(best.plan, exchange=named)

    def runners(self) -> dict[str, Runner]:
        """Return, for every layer, the best that its unit could do in another layout."""
        best, found = self.best, {}
        for number, unit in enumerate(self.units):
            others = [self._evaluate("", plan, best.kind) for plan in self._changed(best.plan, number)]
            fitting = [
                one
                for one in others
                if one.prediction.memory_bytes <= self._limit
                and (one.plan.layouts != best.plan.layouts or one.prediction.step_s != best.prediction.step_s)
            ]
            if not fitting:
                continue
            second = min(fitting, key=self._rank)
            for layer in unit.layers:
                found[layer.name] = Runner(
                    layer=layer.name,
                    plan=second.plan,
                    step_s=second.prediction.step_s - best.prediction.step_s,
                    compute_s=second.prediction.compute_s - best.prediction.compute_s,
                    exposed_s=second.prediction.exposed_s - best.prediction.exposed_s,
                )
        return found

    def _rank(self, candidate: Candidate) -> tuple[bool, float]:
        """Order candidates: those that fit first, by time; those that do not by memory."""
        memory, layouts = candidate.prediction.memory_bytes, candidate.plan.layouts
        if memory > self._limit:
            return True, memory
        changes = sum(one != other for (_, one), (_, other) in pairwise(layouts))
        return False, candidate.prediction.step_s * (1.0 + PRICE_OF_CHANGE * changes)

    def _evaluate(self, name: str, plan: Plan, kind: str = "") -> Candidate:
        """Return a plan under one exchange, or the fastest."""
        key = (plan.layouts, plan.fused, kind)
        if key not in self._seen:
            every = [
                Candidate(name=name, plan=plan, kind=one, prediction=self._predicted(plan, one))
                for one in ([kind] if kind else self._kinds)
            ]
            self._seen[key] = min(every, key=self._rank)
        return self._seen[key]

    def _predicted(self, plan: Plan, kind: str) -> Prediction:
        return predict(self._model, plan, self._buckets(plan, kind), self._site)

    def _buckets(self, plan: Plan, kind: str) -> tuple[Bucket, ...]:
        return choose_buckets(
            self._model,
            kind,
            bucket_bytes=self._bucket_bytes,
            ranks=self._site.ranks,
            global_batch=self._batch,
            machine=self._site.machine,
            nodes=self._site.nodes,
            plan=plan,
            wire_bytes=self._site.wire_bytes,
            every=self._every,
        )

    # -- the programme ----------------------------------------------------------------------------------------------

    def _by_programme(self) -> Iterator[Candidate]:
        """Yield the plans that are cheapest for several weights of what is not known before a plan is whole."""
        prices = [(share, 0.0) for share in EXPOSED_SHARES]
        if self._limit < inf:
            prices += [(EXPOSED_SHARES[1], price) for price in MEMORY_PRICES]
        for share, price in prices:
            layouts, fused = self._cheapest(share, price)
            plan = Plan(
                model=self._model.name,
                ranks=self._site.ranks,
                global_batch=self._batch,
                layouts=tuple((layer.name, layouts[layer.name]) for layer in self._model.layers),
                fused=fused,
            )
            try:
                yield self._evaluate("auto", checked(plan, self._model))
            except PlanError:  # what two units allow each, a third may not
                continue

    def _cheapest(self, exposed_share: float, memory_price: float) -> tuple[dict[str, Layout], frozenset[str]]:
        """Return the layouts of the cheapest way along the chain, and the fused layers."""
        ways: dict[tuple[int, Layout | None], _Way] = {(-1, None): _Way(0.0, None, {}, frozenset())}
        last_layers: list[dict[Layout | None, Layout]] = []
        for stop, unit in enumerate(self.units):
            last_layers.append({})
            for grid in self._grids:
                for start in self._starts(stop, grid):
                    for before in self._befores(start, stop, grid, ways):
                        way = self._extended(
                            ways[start - 1, before], before, start, stop, grid, exposed_share, memory_price
                        )
                        if way is None:
                            continue
                        key = (stop, way.layouts[unit.layers[-1].name])
                        if key not in ways or way.cost < ways[key].cost:
                            ways[key] = way
        best = min((way for (stop, _), way in ways.items() if stop == len(self.units) - 1), key=lambda way: way.cost)
        layouts: dict[str, Layout] = {}
        fused: frozenset[str] = frozenset()
        step: _Way | None = best
        while step is not None:
            layouts, fused, step = layouts | step.layouts, fused | step.fused, step.before
        return layouts, fused

    def _starts(self, stop: int, grid: Layout) -> Iterator[int]:
        """Yield the first units of groups that end with unit `stop`; only tiles are run through as groups."""
        yield stop
        if grid.height * grid.width == 1:
            return
        for start in range(stop - 1, -1, -1):
            if not self.units[start].tiled(grid):
                return
            yield start

    def _befores(
        self, start: int, stop: int, grid: Layout, ways: dict[tuple[int, Layout | None], _Way]
    ) -> list[Layout | None]:
        """Return the layouts from which a segment may be entered; groups from what needs little to be fetched."""
        every = [layout for number, layout in ways if number == start - 1]
        if start == stop:
            return every
        return [layout for layout in every if layout is None or layout in (grid, Layout(sample=self._site.ranks))]

    def _extended(
        self,
        way: _Way,
        before: Layout | None,
        start: int,
        stop: int,
        grid: Layout,
        exposed_share: float,
        memory_price: float,
    ) -> _Way | None:
        """Return a way with one more segment, None where that cannot be."""
        key = (start, stop, grid, before)
        if key not in self._segments:
            segment, grouped = self.units[start : stop + 1], start < stop
            self._segments[key] = cost_of_segment(
                self._model, segment, grid, before, self._batch, self._site, grouped=grouped
            )
        found = self._segments[key]
        if found is None:
            return None
        cost = found.seconds + exposed_share * found.exchange_s + memory_price * found.memory_bytes
        return _Way(way.cost + cost, way, found.layouts, found.fused)

    # -- one unit at a time -----------------------------------------------------------------------------------------

    def _improved(self, best: Candidate) -> Candidate:
        """Return the best plan that single changes lead to."""
        left = MOST_CHANGES
        improved = True
        while improved and left > 0:
            improved = False
            for number in range(len(self.units)):
                for plan in self._changed(best.plan, number):
                    left -= 1
                    one = self._evaluate("auto", plan, best.kind)
                    if self._rank(one) < self._rank(best):
                        best, improved = replace(one, name="auto"), True
        return best

    def _changed(self, plan: Plan, number: int) -> Iterator[Plan]:
        """Yield the plan with another layout for one unit, and with its fusing turned over."""
        unit, layouts = self.units[number], dict(plan.layouts)
        names = {layer.name for layer in unit.layers}
        after = {layer.name for layer in self._model.layers if names.intersection(layer.inputs)}
        changes = [(unit.assigned(grid, self._site.ranks), plan.fused - names - after) for grid in self._grids]
        if any(layouts[name].height * layouts[name].width > 1 for name in names):
            changes += [({}, plan.fused - names), ({}, plan.fused | names)]
        seen = {(plan.layouts, plan.fused)}
        for assigned, fused in changes:
            if assigned is None:
                continue
            changed = replace(plan, layouts=tuple((layouts | assigned).items()), fused=fused)
            if (changed.layouts, changed.fused) in seen:
                continue
            seen.add((changed.layouts, changed.fused))
            try:
                yield checked(changed, self._model)
            except PlanError:
                continue


@dataclass(frozen=True)
class _Way:
    """A way along the chain: its cost, the way before its last segment, and that segment."""

    cost: float
    before: _Way | None
    layouts: dict[str, Layout]
    fused: frozenset[str]
