"""A model as a chain of units, the grids they may be cut by, and what a segment of the chain costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt

from hpcnn.errors import PlanError
from hpcnn.plan import placement
from hpcnn.plan.buckets import Bucket
from hpcnn.plan.exchanges import UPDATE_BYTES
from hpcnn.plan.layer_work import work_of
from hpcnn.plan.layout import Layout
from hpcnn.plan.site import Site
from hpcnn.spec import INPUT, ActivationSpec, LayerSpec, ModelSpec


@dataclass(frozen=True)
class Unit:
    """Layers between two places where a single value lives."""

    layers: tuple[LayerSpec, ...]

    def assigned(self, grid: Layout, ranks: int) -> dict[str, Layout] | None:
        """Return the layouts of the unit under a grid; where a layer cannot be cut so, samples are.

        None where that leaves nothing of the grid.
        """
        found, kept = {}, False
        for layer in self.layers:
            try:
                placement.check(layer, grid, ranks)
                found[layer.name], kept = grid, True
            except PlanError:
                found[layer.name] = Layout(sample=ranks)
        return found if kept else None

    def tiled(self, grid: Layout) -> bool:
        """Return whether all layers may be cut into the tiles of a grid."""
        assigned = self.assigned(grid, grid.ranks)
        return assigned is not None and all(layout == grid for layout in assigned.values())


def units_of(model: ModelSpec) -> tuple[Unit, ...]:
    """Return the units of a model, in order."""
    last_reader = {name: index for index, layer in enumerate(model.layers) for name in layer.inputs}
    units: list[Unit] = []
    start = alive = 0
    for index in range(len(model.layers)):
        if alive <= index:  # whatever was made before this layer has been read by now
            units.append(Unit(model.layers[start : index + 1]))
            start = index + 1
        alive = max(alive, last_reader.get(model.layers[index].name, 0))
    return tuple(units)


def grids(ranks: int, global_batch: int) -> tuple[Layout, ...]:
    """Return the process grids that are tried: one axis, or samples and one more; tiles near square or strips."""
    found: dict[Layout, None] = {}
    for samples in (parts for parts in range(ranks, 0, -1) if ranks % parts == 0):
        rest = ranks // samples
        if samples > global_batch:
            continue
        found[Layout(sample=samples, channel=rest)] = None
        found[Layout(sample=samples, inner=rest)] = None
        width = next(parts for parts in range(isqrt(rest), 0, -1) if rest % parts == 0)
        found[Layout(sample=samples, height=rest // width, width=width)] = None
        found[Layout(sample=samples, height=rest)] = None
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What units cost under one grid, entered from a layout."""

    layouts: dict[str, Layout]
    fused: frozenset[str]
    seconds: float
    """Computation, and waiting for what is fetched."""
    exchange_s: float
    """Gradients and parameters on their way, some of which will hide."""
    memory_bytes: int


def cost_of_segment(
    model: ModelSpec,
    segment: tuple[Unit, ...],
    grid: Layout,
    before: Layout | None,
    global_batch: int,
    site: Site,
    *,
    grouped: bool,
) -> Segment | None:
    """Return what a segment costs, None where it cannot be cut so.

    Parameters
    ----------
    segment : tuple of Unit
        Neighbours in the chain.
    before : Layout or None
        Of what it reads; None where that is the images.
    grouped : bool
        Whether it is one group: all but what it reads itself is computed with borders.
    """
    layouts: dict[str, Layout] = {}
    for unit in segment:
        assigned = unit.assigned(grid, site.ranks)
        if assigned is None or (grouped and any(layout != grid for layout in assigned.values())):
            return None
        layouts |= assigned
    layers = [layer for unit in segment for layer in unit.layers]
    inside = {layer.name for layer in layers}
    fused = frozenset(layer.name for layer in layers if grouped and inside.issuperset(layer.inputs))
    small, all_layouts = _alone(model, layers, before, layouts)
    try:
        placed = placement.place(small, all_layouts, fused, site.ranks, global_batch)
    except PlanError:
        return None
    works = [work_of(layer, placed, site, all_layouts[layer.name].cut) for layer in layers]
    rates = site.machine.rates
    seconds = exchange_s = 0.0
    for layer, work in zip(layers, works, strict=True):
        cut = all_layouts[layer.name].cut
        own = work.parameter_bytes // 4
        reduce, publish = site.exchanged(Bucket(0, own, (layer.name,), "allreduce", cut), model, global_batch)
        exchange_s += reduce.seconds + publish.seconds if own else 0.0
        seconds += sum(work.passes) - (work.passes.input if INPUT in layer.inputs else 0.0)
        waited_for = (work.there, *work.sums)
        seconds += sum(one.seconds + site.machine.stall_s for one in waited_for if one.seconds)
        seconds += max(0.0, work.back.seconds + site.machine.stall_s * bool(work.back.seconds) - work.passes.weight)
        seconds += own * UPDATE_BYTES / rates.update_bytes_per_s
    return Segment(
        layouts=layouts,
        fused=fused,
        seconds=seconds,
        exchange_s=exchange_s,
        memory_bytes=sum(work.saved_bytes + 4 * work.parameter_bytes for work in works),
    )


def _alone(
    model: ModelSpec, layers: Sequence[LayerSpec], before: Layout | None, layouts: dict[str, Layout]
) -> tuple[ModelSpec, dict[str, Layout]]:
    """Return the layers as a model of their own, behind one that stands for what they read, and the layouts of both."""
    inside = {layer.name for layer in layers}
    outside = next((name for layer in layers for name in layer.inputs if name not in inside), INPUT)
    if outside == INPUT:
        return replace(model, layers=tuple(layers)), layouts
    shape = next(layer.input_shape for layer in layers if outside in layer.inputs)
    source = ActivationSpec(name=outside, inputs=(INPUT,), input_shape=shape)
    assert before is not None
    return replace(model, input_shape=shape, layers=(source, *layers)), {outside: before, **layouts}
