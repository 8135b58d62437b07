"""What every layer of a placed model costs in one step: seconds, messages and memory, on the rank with most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from hpcnn.plan.buckets import FLOAT_BYTES
from hpcnn.plan.interior import early
from hpcnn.plan.layout import extent, volume
from hpcnn.plan.placement import Placement
from hpcnn.plan.planner import Plan
from hpcnn.plan.site import NOWHERE, Journey, Site
from hpcnn.plan.turns import GroupSpec, elements_of_turn, turn_boxes
from hpcnn.plan.work import Passes
from hpcnn.spec import BatchNormSpec, LayerSpec, ModelSpec


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What one layer costs in one step: seconds of its passes, what it fetches, what it sums."""

    name: str
    passes: Passes
    there: Journey = NOWHERE
    """What it fetches in forward."""
    back: Journey = NOWHERE
    """How the gradient of that returns."""
    inside: float = 0.0
    """Which part of forward does not wait for what is fetched, on the rank with least."""
    sums: tuple[Journey, Journey] = (NOWHERE, NOWHERE)
    """Inside forward and backward: of a batch norm's statistics, or partial sums and the errors of these."""
    saved_bytes: int = 0
    """Of outputs that live until backward, on the rank with most."""
    turn_bytes: int = 0
    """Of what its group holds in backward beside its input and output, if it is made in turns."""
    parameter_bytes: int = 0


def works(model: ModelSpec, plan: Plan, placement: Placement, site: Site) -> list[LayerWork]:
    """Return what every layer of a placed model costs on a site."""
    cut = plan.cut
    every = {layer.name: work_of(layer, placement, site, cut[layer.name]) for layer in model.layers}
    for group in plan.groups(model):
        every |= {work.name: work for work in _in_turns(group, every, placement, site)}
    return list(every.values())


def _in_turns(
    group: GroupSpec, every: Mapping[str, LayerWork], placement: Placement, site: Site
) -> Iterator[LayerWork]:
    """Yield what the layers of a group cost: each turn's tile, of which forward is made once more in backward."""
    made = [placement.layers[group.name].computed[rank] for rank in site.looked_at()]
    turns = [turn_boxes(group, box) for box in made]
    for index, layer in enumerate(group.layers):
        tiles = [[(extent(boxes[index + 1]), extent(boxes[index])) for boxes in some] for some in turns]
        sums = [
            map(sum, zip(*(site.clock.passes(layer, *tile) for tile in some), strict=True)) for some in tiles if some
        ]
        forward, error, weight, back = (max(column) for column in zip(*sums, strict=True))
        passes = Passes(forward, error + forward, weight, back)
        if layer.name == group.name:
            held = FLOAT_BYTES * max(elements_of_turn(group, box) for box in made)
            yield replace(every[layer.name], passes=passes, turn_bytes=held)
        else:
            yield replace(every[layer.name], passes=passes, saved_bytes=0)


def work_of(layer: LayerSpec, placement: Placement, site: Site, cut: int = 1) -> LayerWork:
    """Return what one layer of a placement costs."""
    placed, looked_at = placement.layers[layer.name], site.looked_at()
    every = [site.clock.passes(layer, extent(placed.partial[rank]), extent(placed.needed[rank])) for rank in looked_at]
    if placed.returned != placed.computed:
        every = [
            site.clock.passes(layer, extent(placed.returned[rank]), extent(placed.reached[rank]))._replace(
                forward=passes.forward
            )
            for rank, passes in zip(looked_at, every, strict=True)
        ]
    there, back, inside = NOWHERE, NOWHERE, 0.0
    for source, moves, settles in zip(layer.inputs, placed.moved, placed.settled, strict=True):
        if moves or settles:
            way = site.moved(placement.way_back(layer.name, source))
            back = back.and_then(way[1])
            if moves:
                same = placed.reached == placed.needed
                there = there.and_then(way[0] if same else site.moved(placement.movement(layer.name, source))[0])
    partial = placement.summing(layer.name)
    if placed.moved == (True,) and partial is None:
        owned = placement.layers[layer.inputs[0]].owned
        inside = min(early(layer, placed.computed[rank], owned[rank]) for rank in looked_at)
    sums: tuple[Journey, Journey] = (NOWHERE, NOWHERE)
    if partial is not None:
        errors, added = site.moved(partial)
        sums = added, errors
    if isinstance(layer, BatchNormSpec) and site.sync_batchnorm and site.ranks > 1:
        channels, nodes = -(-layer.input_shape[-1] // cut), site.nodes[::cut]
        sums = (
            site.summed(1 + 2 * channels, nodes, 8, "butterfly"),
            site.summed(2 * channels, nodes, 8, "butterfly"),
        )
    return LayerWork(
        name=layer.name,
        passes=Passes(*(max(column) for column in zip(*every, strict=True))),
        there=there,
        back=back,
        inside=inside,
        sums=sums,
        saved_bytes=FLOAT_BYTES
        * max(volume(placed.computed[r]) + any(placed.moved) * volume(placed.needed[r]) for r in looked_at),
        parameter_bytes=-(-layer.num_parameters // cut) * FLOAT_BYTES,
    )


def memory_bytes(every: Iterable[LayerWork], image_bytes: int, site: Site) -> int:
    """Return the bytes of arrays on the rank with most: images, outputs kept for backward, and all about parameters."""
    every = list(every)
    per_parameter = 2 + site.state_slots
    saved = sum(work.saved_bytes for work in every)
    # Gradients of an output and of an input live at once.
    largest = max(max(2 * work.saved_bytes, work.turn_bytes) for work in every)
    return image_bytes + saved + largest + per_parameter * sum(work.parameter_bytes for work in every)
