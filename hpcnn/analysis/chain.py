"""Which values of a model are measured: those that all information passes through, and groups of their feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hpcnn.errors import ConfigError
from hpcnn.spec import INPUT, ActivationSpec, AddSpec, BatchNormSpec, ConvSpec, LayerSpec, LinearSpec, ModelSpec


def measured_layers(model: ModelSpec, names: tuple[str, ...] = ()) -> tuple[LayerSpec, ...]:
    """Return the layers whose outputs are measured, in the order in which they run.

    Parameters
    ----------
    names : tuple of str
        Left empty: convolutions, sums of branches and fully connected layers, behind their batch norm and activation,
        as far as no other way leads round them. Inside a residual block one does.

    Raises
    ------
    ConfigError
        If a name is none, or there are fewer than two.
    """
    if names:
        known = {layer.name for layer in model.layers}
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"config: 'analysis.layers' names '{name}', which is no layer of {model.name}; its layers are"
                    f" {', '.join(layer.name for layer in model.layers)}."
                )
        chosen = dict.fromkeys(names)
    else:
        through = passed_through(model)
        behind = (_behind(model, layer) for layer in model.layers if isinstance(layer, ConvSpec | AddSpec | LinearSpec))
        chosen = dict.fromkeys(name for name in behind if name in through)
    layers = tuple(layer for layer in model.layers if layer.name in chosen)
    if len(layers) < 2:
        raise ConfigError("config: 'analysis.layers' must name at least two layers, to compare what they share.")
    return layers


def passed_through(model: ModelSpec) -> set[str]:
    """Return the layers that every way from images to logits leads through: their outputs are a Markov chain."""
    order = {INPUT: -1} | {layer.name: index for index, layer in enumerate(model.layers)}
    last_read = order.copy()
    for layer in model.layers:
        for source in layer.inputs:
            last_read[source] = order[layer.name]
    found, reaches = set(), last_read[INPUT]
    for index, layer in enumerate(model.layers):
        if reaches <= index:
            found.add(layer.name)
        reaches = max(reaches, last_read[layer.name])
    return found


def _behind(model: ModelSpec, layer: LayerSpec) -> str:
    """Return the last of the batch norms and activations that alone read a layer, or one another; else the layer."""
    readers = [other for other in model.layers if layer.name in other.inputs]
    if len(readers) == 1 and isinstance(readers[0], BatchNormSpec | ActivationSpec):
        return _behind(model, readers[0])
    return layer.name


@dataclass(frozen=True)
class MapGroups:
    """Groups of a layer's feature maps that are measured as variables of their own.

    Attributes
    ----------
    maps : tuple of int
        The maps that are looked at, of all that the layer has.
    pairs : tuple of (int, int)
        Positions in `maps`.
    sizes : tuple of int
        The first so many of `maps` are a group each; the last is all.
    """

    maps: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, channels: int, num_maps: int, num_pairs: int, seed: int) -> MapGroups:
        """Return `num_maps` maps evenly spread over `channels`, pairs drawn from them, and groups that double."""
        count = min(channels, num_maps)
        pairs = list(combinations(range(count), 2))
        chosen = np.random.default_rng(seed).permutation(len(pairs))[:num_pairs]
        return cls(
            maps=tuple(index * channels // count for index in range(count)),
            pairs=tuple(pairs[index] for index in sorted(chosen.tolist())),
            sizes=(*(1 << power for power in range(1, 32) if 1 << power < count), count),
        )

    def members(self, channels: int) -> np.ndarray:
        """Return which maps belong to each group, bool (groups, channels): single maps, pairs, sizes, all but one."""
        count = len(self.maps)
        everything = range(count)
        groups: list[list[int]] = [[one] for one in everything]
        groups += [list(pair) for pair in self.pairs]
        groups += [list(range(size)) for size in self.sizes]
        groups += [[other for other in everything if other != one] for one in everything]
        table = np.zeros((len(groups), channels), bool)
        for row, group in zip(table, groups, strict=True):
            row[[self.maps[index] for index in group]] = True
        return table

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the values of single maps, pairs, growing groups and all but one, from those of all groups."""
        one, two = len(self.maps), len(self.maps) + len(self.pairs)
        three = two + len(self.sizes)
        return values[:one], values[one:two], values[two:three], values[three:]
