"""Buckets: stretches of the flat gradient vector that travel together, each by one kind of exchange.

Backward finishes layers from last to first, and the flat vector holds them first to last, so a bucket is a contiguous
range that grows downwards. The layout depends on the model, `bucket_bytes` and the kinds alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from hpcnn.spec import LayerSpec

FLOAT_BYTES = 4
SHORTEST_BUCKET_BYTES = 1 << 16


@dataclass(frozen=True)
class Bucket:
    """Elements [start, stop) of the flat vector: all parameters of `layers`, in the order backward finishes them.

    `kind` is how they travel: "allreduce", "sharded" or, for a single fully connected layer, "factors". `cut` is into
    how many parts they are cut, of which a rank has one: replicas of it are on every `cut`-th rank. They travel in one
    step of `every`; in the others they are only added up.
    """

    start: int
    stop: int
    layers: tuple[str, ...]
    kind: str = "allreduce"
    cut: int = 1
    every: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def label(self) -> str:
        """The layers, for people."""
        return self.layers[0] if len(self.layers) == 1 else f"{self.layers[-1]} .. {self.layers[0]}"


def make_buckets(
    layers: Sequence[LayerSpec],
    bucket_bytes: int,
    kinds: Mapping[str, str] | None = None,
    cuts: Mapping[str, int] | None = None,
    every: Mapping[str, int] | None = None,
) -> tuple[Bucket, ...]:
    """Return the buckets in the order backward completes them, each closed once it holds `bucket_bytes` or more.

    The last ones get smaller: a bucket is also closed once it holds half of what was left of the model, if that is
    `SHORTEST_BUCKET_BYTES` or more. For what is complete only when backward ends has nothing to hide behind.
    Layers are never cut, so a bucket can be longer than `bucket_bytes` by one layer. A bucket has layers of one kind
    (those that `kinds` does not name are "allreduce"), one cut and one `every`, one layer only where it is "factors".
    """
    kinds, cuts, every = kinds or {}, cuts or {}, every or {}
    sizes = [(layer.name, sum(prod(shape) for shape in layer.parameters.values())) for layer in layers]
    start = sum(size for _, size in sizes)
    buckets: list[Bucket] = []
    names: list[str] = []
    how, stop = ("", 1, 1), start

    def close() -> None:
        nonlocal names, stop
        if names:
            buckets.append(Bucket(start, stop, tuple(names), *how))
        names, stop = [], start

    for name, size in reversed(sizes):
        if size == 0:
            continue
        its = (kinds.get(name, "allreduce"), cuts.get(name, 1), every.get(name, 1))
        if its != how:
            close()
            how = its
        names.append(name)
        start -= size
        half_of_rest = max(stop * FLOAT_BYTES // 2, SHORTEST_BUCKET_BYTES)
        if how[0] == "factors" or (stop - start) * FLOAT_BYTES >= min(bucket_bytes, half_of_rest):
            close()
    close()
    return tuple(buckets)


def located(buckets: Sequence[Bucket], layers: Sequence[LayerSpec]) -> tuple[Bucket, ...]:
    """Return the buckets as they lie in the flat vector of a rank whose parts of all layers are `layers`."""
    sizes = {layer.name: layer.num_parameters for layer in layers}
    stop, found = sum(sizes.values()), []
    for bucket in buckets:
        start = stop - sum(sizes[name] for name in bucket.layers)
        found.append(replace(bucket, start=start, stop=stop))
        stop = start
    return tuple(found)
