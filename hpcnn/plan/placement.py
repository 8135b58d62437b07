"""What every rank owns, computes and reads of every layer, for a batch of N samples.

A rank owns a box of each layer's output, by the layer's layout. It computes that box, or a larger one where a layer
above is fused to this one: then it makes the border that it will read itself, instead of fetching it. What it reads of
the inputs follows from the layer's window. What it reads and has not computed is moved, from the owners.

Backward goes the same ways reversed. A rank has the gradient of what it computed in as far as its own outputs depend on
it; where forward moved, these parts are summed at the owners, and where it did not, they stay. A fused layer may
settle: what its rank computed it read without a message, but the gradients of that border are summed at the owners all
the same, and the layers below go back through less than they computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpcnn.arrays import Padding, Pair
from hpcnn.errors import PlanError
from hpcnn.geometry import NO_PADDING, Block, blocks
from hpcnn.plan.layout import Box, Layout, contains, hull, volume
from hpcnn.plan.movement import Movement
from hpcnn.plan.tiles import tile_cuts
from hpcnn.spec import (
    INPUT,
    BatchNormSpec,
    ConvSpec,
    FlattenSpec,
    GlobalAveragePoolSpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    PoolSpec,
    ShortcutSpec,
)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One layer on all ranks; boxes by rank.

    Attributes
    ----------
    owned : tuple of Box
        Of the output; together they cover it once.
    computed : tuple of Box
        Of the output: what the rank has in the end.
    partial : tuple of Box
        Of the output: what it makes, which is the same, or partial sums, over its input channels, of more.
    needed : tuple of Box
        Of each input: what it reads.
    moved : tuple of bool
        For each input, whether it is moved from its owners, rather than cut out of what the rank computed.
    returned : tuple of Box
        Of the output: what the rank goes back through, having a part of its gradient.
    reached : tuple of Box
        Of each input: of what it has a gradient then.
    settled : tuple of bool
        For each input, whether that gradient is sent to the owners though the input was not moved.
    """

    owned: tuple[Box, ...]
    computed: tuple[Box, ...]
    partial: tuple[Box, ...]
    needed: tuple[Box, ...]
    moved: tuple[bool, ...]
    returned: tuple[Box, ...]
    reached: tuple[Box, ...]
    settled: tuple[bool, ...]

    @property
    def made_back(self) -> tuple[Box, ...]:
        """Of the output: what backward makes gradients from; of partial sums, the errors of all."""
        return self.returned if self.partial == self.computed else self.partial


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All layers of a model.

    Attributes
    ----------
    layers : dict of str to Placed
        By name.
    images : tuple of Box
        What each rank reads of the images, as they come from the loader.
    loss : tuple of Box
        Whole rows of the logits, for which each rank computes the loss.
    loss_moved : bool
        Whether they are moved.
    """

    layers: Mapping[str, Placed]
    images: tuple[Box, ...]
    loss: tuple[Box, ...]
    loss_moved: bool

    def movement(self, layer: str, source: str) -> Movement:
        """Return how what `layer` reads of `source` reaches it."""
        return Movement(self.layers[source].owned, self.layers[layer].needed)

    def way_back(self, layer: str, source: str) -> Movement:
        """Return the movement whose adjoint brings `layer`'s gradients of `source` to the owners."""
        return Movement(self.layers[source].owned, self.layers[layer].reached)

    def summing(self, layer: str) -> Movement | None:
        """Return the movement whose way back adds partial sums up at their owners; None where sums are whole."""
        placed = self.layers[layer]
        return None if placed.partial == placed.computed else Movement(placed.owned, placed.partial)


def place(
    model: ModelSpec,
    layouts: Mapping[str, Layout],
    fused: frozenset[str],
    ranks: int,
    num_samples: int,
    *,
    settled: frozenset[str] = frozenset(),
) -> Placement:
    """Return the placement of a model.

    Parameters
    ----------
    layouts : dict of str to Layout
        Of every layer's output.
    fused : set of str
        Layers whose inputs their ranks compute themselves, borders included.
    ranks, num_samples : int
        P and N.
    settled : set of str
        Those of them whose inputs' gradients are sent to the owners.

    Raises
    ------
    PlanError
        If a layer cannot be split as asked.
    """
    for layer in model.layers:
        check(layer, layouts[layer.name], ranks)
    for name in sorted(settled - fused):
        raise PlanError(
            f"plan: '{name}' is to settle what it computes of its neighbours' input, and is not fused to that input."
            " Set fused = true, or settle = false."
        )
    if not fused and set(layouts.values()) == {Layout(sample=ranks)}:
        return _by_samples(model, ranks, num_samples)
    cuts = tile_cuts(model, layouts)
    owned = {
        layer.name: layouts[layer.name].boxes(ranks, num_samples, layer.output_shape, *cuts.get(layer.name, ()))
        for layer in model.layers
    }
    readers: dict[str, list[str]] = {}
    computed: dict[str, tuple[Box, ...]] = {}
    partial: dict[str, tuple[Box, ...]] = {}
    needed: dict[str, tuple[Box, ...]] = {}
    for layer in reversed(model.layers):
        name = layer.name
        wanted = [owned[name], *(needed[reader] for reader in readers.get(name, ()) if reader in fused)]
        computed[name] = _hulls(layer, layouts[name], *wanted)
        _check_computed(layer, layouts[name], owned[name], computed[name])
        partial[name] = computed[name]
        if layouts[name].inner > 1:
            shape = layer.output_shape
            partial[name] = layouts[name].boxes(ranks, num_samples, shape, *cuts.get(name, ()), owned=False)
        needed[name] = tuple(
            needs(layer, box, layouts[name].input_channels(rank, layer.input_shape[-1]))
            for rank, box in enumerate(partial[name])
        )
        for source in layer.inputs:
            readers.setdefault(source, []).append(name)

    _check_fused(model, layouts, fused)

    placed = _place_back(model, layouts, owned, computed, partial, needed, settled)
    last = model.layers[-1]
    loss = Layout(sample=ranks).boxes(ranks, num_samples, last.output_shape)
    loss_moved = not all(map(contains, computed[last.name], loss))
    images = tuple(map(hull, zip(*(needed[reader] for reader in readers[INPUT]), strict=True)))
    images = tuple((*box[:-1], Block(0, model.input_shape[-1])) if volume(box) else box for box in images)
    return Placement(layers=placed, images=images, loss=loss, loss_moved=loss_moved)


def _by_samples(model: ModelSpec, ranks: int, num_samples: int) -> Placement:
    """Return the placement of whole samples, where nothing overlaps and nothing moves: fast for thousands of ranks."""
    samples, known, placed = blocks(num_samples, ranks), {}, {}

    def boxes(tail: Box) -> tuple[Box, ...]:
        if tail not in known:
            known[tail] = tuple((n, *tail) if n.size else (Block(0, 0),) * (1 + len(tail)) for n in samples)
        return known[tail]

    for layer in model.layers:
        made: Box = tuple(Block(0, size) for size in layer.output_shape)
        own, read, no = boxes(made), boxes(needs(layer, (samples[0], *made))[1:]), (False,) * len(layer.inputs)
        placed[layer.name] = Placed(
            owned=own, computed=own, partial=own, needed=read, moved=no, returned=own, reached=read, settled=no
        )
    first = [placed[layer.name].needed[0] for layer in model.layers if INPUT in layer.inputs]
    images = boxes((*hull(first)[1:-1], Block(0, model.input_shape[-1])))
    return Placement(layers=placed, images=images, loss=placed[model.layers[-1].name].owned, loss_moved=False)


def _place_back(
    model: ModelSpec,
    layouts: Mapping[str, Layout],
    owned: Mapping[str, tuple[Box, ...]],
    computed: Mapping[str, tuple[Box, ...]],
    partial: Mapping[str, tuple[Box, ...]],
    needed: Mapping[str, tuple[Box, ...]],
    settled: frozenset[str],
) -> dict[str, Placed]:
    """Return the layers with what backward needs, given their boxes of forward."""
    placed: dict[str, Placed] = {}
    here: dict[str, list[tuple[Box, ...]]] = {}  # of each value, what its readers leave of its gradient where it is
    for layer in reversed(model.layers):
        name = layer.name
        returned = _hulls(layer, layouts[name], owned[name], *here.get(name, ()))
        reached = needed[name] if layouts[name].inner > 1 else tuple(needs(layer, box) for box in returned)
        moved, settles = [], []
        for source in layer.inputs:
            known = source != INPUT
            moved.append(known and not all(map(contains, computed[source], needed[name])))
            settles.append(known and name in settled and not all(map(contains, owned[source], reached)))
            if not moved[-1] and not settles[-1]:
                here.setdefault(source, []).append(reached)
        placed[name] = Placed(
            owned=owned[name],
            computed=computed[name],
            partial=partial[name],
            needed=needed[name],
            moved=tuple(moved),
            returned=returned,
            reached=reached,
            settled=tuple(settles),
        )
    return dict(reversed(placed.items()))


def needs(layer: LayerSpec, box: Box, channels: Block | None = None) -> Box:
    """Return what a layer reads of each input to make `box` of its output.

    Parameters
    ----------
    channels : Block, optional
        Input channels over which partial sums are made; left out, all.
    """
    shape = layer.input_shape
    if not volume(box):
        return (Block(0, 0),) * (1 + len(shape))
    everything = tuple(Block(0, size) for size in shape)
    match layer:
        case ConvSpec():
            return box[0], *_window(layer, box)[0], channels or everything[2]
        case PoolSpec():
            return box[0], *_window(layer, box)[0], box[3]
        case ShortcutSpec():
            rows, columns = (
                whole if block.size == made else Block(block.start * step, (block.stop - 1) * step + 1)
                for block, step, whole, made in zip(
                    box[1:3], layer.stride, everything, layer.output_shape, strict=False
                )
            )
            channels = Block(min(box[3].start, shape[2]), min(box[3].stop, shape[2]))
            return box[0], rows, columns, channels
        case GlobalAveragePoolSpec():
            return box[0], everything[0], everything[1], box[1]
        case LinearSpec():
            return box[0], channels or everything[0]
        case FlattenSpec():
            return (box[0], *everything)
    return box


def padding(layer: LayerSpec, box: Box) -> Padding:
    """Return the padding with which the box that `needs` names yields `box`: what of the window lies off the image."""
    return _window(layer, box)[1] if isinstance(layer, ConvSpec | PoolSpec) and volume(box) else NO_PADDING


def _window(layer: ConvSpec | PoolSpec, box: Box) -> tuple[tuple[Block, Block], Padding]:
    """Return rows and columns that the windows of `box` lie on, and how far they stick out on each side.

    An axis that is not cut is read as it is, with what no window reaches.
    """
    size, dilation = _kernel(layer)
    inside, outside = [], []
    for axis in range(2):
        block, step, before = box[1 + axis], layer.stride[axis], layer.padding[axis][0]
        if block.size == layer.output_shape[axis]:
            inside.append(Block(0, layer.input_shape[axis]))
            outside.append(layer.padding[axis])
            continue
        first = block.start * step - before
        last = (block.stop - 1) * step - before + (size[axis] - 1) * dilation[axis] + 1
        start, stop = max(first, 0), min(last, layer.input_shape[axis])
        inside.append(Block(start, stop))
        outside.append((start - first, last - stop))
    return (inside[0], inside[1]), (outside[0], outside[1])


def _kernel(layer: ConvSpec | PoolSpec) -> tuple[Pair, Pair]:
    """Return the rows and columns of a layer's window, and how far apart they lie."""
    return (layer.kernel_size, layer.dilation) if isinstance(layer, ConvSpec) else (layer.window, (1, 1))


def may_miss(layer: ConvSpec | PoolSpec) -> bool:
    """Return whether a window may lie in the padding altogether."""
    size, dilation = _kernel(layer)
    return any(max(layer.padding[axis]) > (size[axis] - 1) * dilation[axis] for axis in range(2))


def check(layer: LayerSpec, layout: Layout, ranks: int) -> None:
    """Raise PlanError unless `layer` is known to be right under `layout` on so many ranks."""
    tiles, channel, inner = layout.height * layout.width, layout.channel, layout.inner

    def refuse(what: str, fix: str) -> PlanError:
        return PlanError(f"plan: layer '{layer.name}' {what}. {fix}")

    if layout.ranks > ranks:
        raise refuse(
            f"has a grid of {layout.ranks} ranks {layout.grid}, and there are {ranks}", "Start more, or cut less."
        )
    if tiles > 1 and len(layer.output_shape) == 1:
        raise refuse(
            f"has {layer.output_shape[0]} features without rows and columns to cut", "Set height and width to 1."
        )
    if layout.cut > 1 and layout.ranks != ranks:
        raise refuse(
            f"is cut along channels, and its grid of {layout.ranks} ranks leaves out some of {ranks}",
            "Make the product of its parts the number of ranks.",
        )
    if channel > layer.output_shape[-1]:
        raise refuse(
            f"has {layer.output_shape[-1]} channels, too few for channel (={channel}) parts", "Cut it less often."
        )
    if inner > 1 and not isinstance(layer, ConvSpec | LinearSpec):
        raise refuse(f"does not sum over input channels, so inner (={inner}) has nothing to cut", "Set inner to 1.")
    if inner > layer.input_shape[-1]:
        raise refuse(
            f"has {layer.input_shape[-1]} input channels, too few for inner (={inner}) parts", "Cut it less often."
        )
    match layer:
        case ConvSpec() if layout.cut > 1 and layer.groups > 1:
            raise refuse(
                f"has filters in {layer.groups} groups, which this version does not split",
                "Set channel and inner to 1.",
            )
        case FlattenSpec() if channel > 1:
            raise refuse("is a flatten, which keeps samples whole", "Cut samples only.")
    if tiles > 1 and isinstance(layer, ConvSpec | PoolSpec) and may_miss(layer):
        raise refuse(
            f"is padded by {layer.padding}, so far that whole windows lie off the image",
            "Cut samples or channels only.",
        )


def _hulls(layer: LayerSpec, layout: Layout, *boxes: tuple[Box, ...]) -> tuple[Box, ...]:
    """Return each rank's smallest box around all of its `boxes`, with the channels that it has filters for.

    It makes all of these or none, also where it owns nothing, and what is fused to the layer reads some of them.
    """
    found = []
    for rank, box in enumerate(map(hull, zip(*boxes, strict=True))):
        channels = layout.output_channels(rank, layer.output_shape[-1])
        found.append((*box[:-1], *hull([box[-1:], (channels,)])) if volume(box) else box)
    return tuple(found)


def _check_computed(layer: LayerSpec, layout: Layout, owned: Sequence[Box], computed: Sequence[Box]) -> None:
    """Raise PlanError if what is computed for fused layers is more than is right."""
    if isinstance(layer, BatchNormSpec) and computed != owned:
        raise PlanError(
            f"plan: '{layer.name}' is a batch norm, whose statistics take every position once; the layers that read it"
            " cannot be fused to it where they overlap. Set fused = false for them."
        )
    last = layer.output_shape[-1]
    if any(box[-1] != layout.output_channels(rank, last) for rank, box in enumerate(computed) if volume(box)):
        raise PlanError(
            f"plan: '{layer.name}' is cut along channels, and a layer that is fused to it reads more of them than a"
            " rank has filters for. Set fused = false for the layers that read it."
        )
    if layout.inner > 1 and computed != owned:
        raise PlanError(
            f"plan: '{layer.name}' has partial sums, which are completed at the owners of their boxes only; the layers"
            " that read more cannot be fused to it. Set fused = false for them."
        )


def _check_fused(model: ModelSpec, layouts: Mapping[str, Layout], fused: frozenset[str]) -> None:
    """Raise PlanError if a layer is fused to one that cuts samples in another way."""
    for layer in model.layers:
        for source in layer.inputs if layer.name in fused else ():
            below, above = layouts.get(source), layouts[layer.name]
            if below is not None and (below.sample, below.ranks) != (above.sample, above.ranks):
                # Whoever has no sample of a small batch would compute another tile than of a large one.
                raise PlanError(
                    f"plan: '{layer.name}' is fused to '{source}', and their grids {above.grid} and {below.grid} cut"
                    " samples differently. Set fused = false, or cut samples alike on as many ranks."
                )
