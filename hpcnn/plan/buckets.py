"""Buckets: stretches of the flat gradient vector that travel as one message.

Backward finishes layers from last to first, and the flat vector holds them first to last, so a bucket is a contiguous
range that grows downwards. The layout depends on the model and `bucket_bytes` alone, never on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from hpcnn.spec import LayerSpec

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Bucket:
    """Elements [start, stop) of the flat vector: all parameters of `layers`, in the order backward finishes them."""

    start: int
    stop: int
    layers: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def make_buckets(layers: Sequence[LayerSpec], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Return the buckets in the order backward completes them, each closed once it holds `bucket_bytes` or more.

    Layers are never cut, so a bucket can be longer than `bucket_bytes` by one layer.
    """
    sizes = [(layer.name, sum(prod(shape) for shape in layer.parameters.values())) for layer in layers]
    stop = start = sum(size for _, size in sizes)
    names: list[str] = []
    buckets = []
    for name, size in reversed(sizes):
        if size == 0:
            continue
        names.append(name)
        start -= size
        if (stop - start) * FLOAT_BYTES >= bucket_bytes:
            buckets.append(Bucket(start, stop, tuple(names)))
            stop, names = start, []
    if names:
        buckets.append(Bucket(start, stop, tuple(names)))
    return tuple(buckets)
