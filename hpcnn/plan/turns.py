"""Turns: layers that a rank computes tile after tile, so that it holds the feature maps of one tile at a time.

A group is a chain of layers, each of which reads the one before and nothing else. Every turn makes a tile of what the
rank computes of the last layer, with as much of the layers below as that takes: where tiles need the same border, each
computes it. Forward keeps the group's input and output only; backward makes the feature maps of a tile once more
before it goes back through them.

References
----------
Zhao, Barijough, Gerstlauer, "DeepThings: distributed adaptive deep learning inference on resource-constrained IoT edge
clusters", TCAD 37 (11), 2018. Rama, Threadgill, Gerstlauer, arXiv:2409.09083. Chen, Xu, Zhang, Guestrin, "Training deep
nets with sublinear memory cost", arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hpcnn.arrays import Pair, Shape
from hpcnn.errors import PlanError
from hpcnn.geometry import Block, blocks
from hpcnn.plan import placement
from hpcnn.plan.layout import Box, Layout, volume
from hpcnn.spec import INPUT, ActivationSpec, ConvSpec, LayerSpec, ModelSpec, PoolSpec


@dataclass(frozen=True, kw_only=True)
class GroupSpec(LayerSpec):
    """A chain of layers as one: it has the name of the last and reads what the first reads.

    `turns` is into how many rows and columns of tiles the output is cut.
    """

    layers: tuple[LayerSpec, ...]
    turns: Pair

    @property
    def output_shape(self) -> Shape:  # noqa: D102
        return self.layers[-1].output_shape

    def goes_back(self, index: int) -> bool:
        """Return whether backward makes the gradient of what layer `index` reads: where parameters lie below."""
        return self.inputs != (INPUT,) or any(layer.parameters for layer in self.layers[:index])


def groups(
    model: ModelSpec, layouts: Mapping[str, Layout], fused: frozenset[str], turns: Sequence[tuple[str, Pair]]
) -> tuple[GroupSpec, ...]:
    """Return the groups that end with the layers in `turns`.

    A group reaches towards the images as far as layers are fused to what they read, but not into another group.

    Raises
    ------
    PlanError
        If a group has one layer only, or one that is not known to be right in turns.
    """
    layers = {layer.name: layer for layer in model.layers}
    last_layers = {name for name, _ in turns}
    found = []
    for name, grid in turns:
        chain = [layers[name]]
        while chain[0].name in fused and chain[0].inputs[0] not in {INPUT, *last_layers}:
            chain.insert(0, layers[chain[0].inputs[0]])
        if len(chain) == 1:
            raise PlanError(
                f"plan: layer '{name}' ends a group of turns {list(grid)} that has no other layer. Set fused = true for"
                " it, and for those below that are to be computed with it."
            )
        for layer, above in zip(reversed(chain), [None, *reversed(chain[1:])], strict=True):
            check(model, layer, layouts[layer.name], grid, above)
        first = chain[0]
        found.append(
            GroupSpec(name=name, inputs=first.inputs, input_shape=first.input_shape, layers=tuple(chain), turns=grid)
        )
    return tuple(found)


def check(model: ModelSpec, layer: LayerSpec, layout: Layout, turns: Pair, above: LayerSpec | None = None) -> None:
    """Raise PlanError unless `layer` may be in a group, with `above` for the next one."""

    def refuse(what: str) -> PlanError:
        fix = f"Set fused = false for '{above.name}'" if above else "Set no turns for it"
        return PlanError(f"plan: layer '{layer.name}' {what}, so that it cannot be computed in turns. {fix}.")

    if not isinstance(layer, ConvSpec | PoolSpec | ActivationSpec):
        kind = type(layer).__name__.removesuffix("Spec")
        raise refuse(f"is a {kind}, and not a convolution, pooling or activation")
    if layout.ranks != layout.sample * layout.height * layout.width:
        raise refuse(f"has a grid {layout.grid} that cuts channels, which move between ranks")
    readers = [reader.name for reader in model.layers if layer.name in reader.inputs]
    if above and readers != [above.name]:
        raise refuse(f"is read by {', '.join(map(repr, readers))}, and not by one layer")
    placement.check(layer, Layout(height=turns[0], width=turns[1]), turns[0] * turns[1])


def chains_from_images(model: ModelSpec, layouts: Mapping[str, Layout], turns: Pair) -> tuple[tuple[str, ...], ...]:
    """Return the layers that may be in groups, from the images on, as chains of two or more that end with poolings.

    Poolings leave little to keep, and few layers need little of a border.
    """

    def fits(layer: LayerSpec, below: LayerSpec) -> bool:
        here, there = layouts[layer.name], layouts[below.name]
        with suppress(PlanError):
            check(model, layer, here, turns)
            return (here.sample, here.ranks) == (there.sample, there.ranks)
        return False

    chains: list[list[LayerSpec]] = [[]]
    readers = [layer for layer in model.layers if INPUT in layer.inputs]
    while len(readers) == 1 and fits(readers[0], (chains[-1] or readers)[-1]):
        chains[-1] += readers
        if isinstance(readers[0], PoolSpec):
            chains.append([])
        readers = [layer for layer in model.layers if readers[0].name in layer.inputs]
    return tuple(tuple(layer.name for layer in chain) for chain in chains if len(chain) > 1)


def turn_boxes(group: GroupSpec, box: Box, turns: Pair | None = None) -> tuple[tuple[Box, ...], ...]:
    """Return, turn by turn, what is read of the group's input and made of each layer's output.

    Parameters
    ----------
    box : Box
        Of the group's output, what the rank computes.
    turns : (int, int), optional
        Rows and columns of tiles; left out, the group's. Tiles that would be empty get no turn.
    """
    down, across = (
        [
            Block(whole.start + part.start, whole.start + part.stop)
            for part in blocks(whole.size, min(parts, max(1, whole.size)))
        ]
        for whole, parts in zip(box[1:3], turns or group.turns, strict=True)
    )
    found = []
    for tile in ((box[0], rows, columns, box[3]) for rows in down for columns in across):
        if volume(tile):
            chain: list[Box] = [tile]
            for layer in reversed(group.layers):
                chain.insert(0, placement.needs(layer, chain[0]))
            found.append(tuple(chain))
    return tuple(found)


def elements_of_turn(group: GroupSpec, box: Box) -> int:
    """Return what backward through `box` holds at most, beside the group's input and the gradient of its output.

    That is the gradient of the input, which turns add to, and what one turn makes.
    """
    read = sum(volume(boxes[0]) for boxes in turn_boxes(group, box, (1, 1))) if group.goes_back(0) else 0
    return read + max((_peak(group, boxes) for boxes in turn_boxes(group, box)), default=0)


def peak_elements(group: GroupSpec, box: Box, *, whole: bool = False) -> int:
    """Return the largest number of elements of feature maps and their gradients that a group holds at a time.

    Parameters
    ----------
    box : Box
        Of the group's output, what the rank computes of the batch.
    whole : bool
        Without turns.
    """
    once = turn_boxes(group, box, (1, 1))
    if whole or not once:
        return max((_peak(group, boxes) for boxes in once), default=0)
    return volume(once[0][0]) + volume(box) + elements_of_turn(group, box)


def _peak(group: GroupSpec, boxes: Sequence[Box]) -> int:
    """Return what is held at most while the boxes of one turn are made and gone back through.

    What each layer has read and made is held until backward is through with it, and beside it the gradient of its
    output, before and after a fused activation, and of its input.
    """
    made = [volume(box) for box in boxes]
    steps = []
    for index, layer in enumerate(group.layers):
        activated = isinstance(layer, ActivationSpec) or getattr(layer, "activation", None) is not None
        grads = made[index + 1] * (2 if activated else 1) if group.goes_back(index + 1) else 0
        grads += made[index] if group.goes_back(index) else 0
        steps.append(sum(made[: index + 2]) + grads)
    return max(steps)
