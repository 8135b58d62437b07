"""Seconds that one rank computes: each pass of a layer over a box of its output.

A pass costs an operator's overhead, and then as long as its arithmetic or its memory takes, whichever is longer (the
roofline). How near to that a layer comes depends on its shape, so a machine may hold measured times (`Timing`): a pass
is then priced as the nearest measured one of the same kind, in proportion to what the roofline says of both.

Legend: N samples, P Q output rows and columns, C channels read, K channels made, R S filter rows and columns.

References
----------
Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore architectures",
CACM 52 (4), 2009.
"""

from __future__ import annotations

from math import inf, log, prod
from typing import NamedTuple

from hpcnn.arrays import Shape
from hpcnn.plan.buckets import FLOAT_BYTES
from hpcnn.plan.machine import Machine, Timing
from hpcnn.spec import (
    ActivationSpec,
    AddSpec,
    BatchNormSpec,
    ConvSpec,
    DropoutSpec,
    GlobalAveragePoolSpec,
    LayerSpec,
    LinearSpec,
    PoolSpec,
    ShortcutSpec,
)


class Passes(NamedTuple):
    """Seconds of the four functions of a layer (`nn/layer.py`)."""

    forward: float = 0.0
    error: float = 0.0
    weight: float = 0.0
    input: float = 0.0

    def scaled(self, other: Passes, base: Passes) -> Passes:
        """Return these times, each in the proportion of `other` to `base`."""
        return Passes(*(s * (o / b) if b else o for s, o, b in zip(self, other, base, strict=True)))


class Extent(NamedTuple):
    """How much of a layer is computed: samples, output rows and columns, channels made and channels read."""

    samples: int
    rows: int
    columns: int
    made: int
    read: int


def extent_of(output: Shape, read: Shape) -> Extent:
    """Return the extent of a layer that makes an array of shape `output`, (N, P, Q, K) or (N, K), out of `read`."""
    rows, columns = output[1:3] if len(output) == 4 else (1, 1)
    return Extent(output[0], rows, columns, output[-1], read[-1])


def signature(layer: LayerSpec) -> str:
    """Return what of a layer, besides its extent, decides how fast it runs."""
    name = type(layer).__name__.removesuffix("Spec").lower()
    match layer:
        case ConvSpec():
            (r, s), (down, across), (i, j) = layer.kernel_size, layer.stride, layer.dilation
            return f"{name} {r}x{s} /{down}x{across} *{i}x{j} g{layer.groups}{_fused(layer.activation)}"
        case PoolSpec():
            (r, s), (down, across) = layer.window, layer.stride
            return f"{layer.kind} {name} {r}x{s} /{down}x{across}"
        case ShortcutSpec():
            return f"{name} /{layer.stride[0]}x{layer.stride[1]}"
        case LinearSpec() | BatchNormSpec() | AddSpec():
            return f"{name}{_fused(layer.activation)}"
    return name


def _fused(activation: str | None) -> str:
    return f" {activation}" if activation else ""


class Clock:
    """Prices passes on one machine, remembering what it has priced."""

    def __init__(self, machine: Machine) -> None:
        self._rates = machine.rates
        self._timings: dict[str, list[Timing]] = {}
        for timing in machine.timings:
            self._timings.setdefault(timing.layer, []).append(timing)
        self._known: dict[tuple[object, ...], Passes] = {}

    def passes(self, layer: LayerSpec, output: Shape, read: Shape) -> Passes:
        """Return the seconds of a layer's passes.

        Parameters
        ----------
        output, read : (N, P, Q, K) and (N, H, W, C), or (N, K) and (N, C)
            Shapes of what is made and of the (first) input; nothing takes no time.
        """
        if not prod(output):
            return Passes()
        key = (signature(layer), output, read, getattr(layer, "groups", 1))
        if key not in self._known:
            self._known[key] = self._priced(layer, output, read)
        return self._known[key]

    def _priced(self, layer: LayerSpec, output: Shape, read: Shape) -> Passes:
        roofline, here = self._roofline(layer, output, read), extent_of(output, read)
        best, nearest = inf, None
        if not all(here):  # zeros out of nothing, as in a shortcut's new channels
            return roofline
        for timing in self._timings.get(signature(layer), ()):
            distance = sum(abs(log(a / b)) for a, b in zip(here, timing.extent, strict=True))
            if distance < best:
                best, nearest = distance, timing
        if nearest is None:
            return roofline
        there = Extent(*nearest.extent)
        flat = len(output) == 2
        made = (there.samples, there.made) if flat else (there.samples, there.rows, there.columns, there.made)
        seen = (there.samples, there.read) if flat else (there.samples, *_read_size(layer, there), there.read)
        return Passes(*nearest.seconds).scaled(roofline, self._roofline(layer, made, seen))

    def _roofline(self, layer: LayerSpec, output: Shape, read: Shape) -> Passes:
        rates, made, seen = self._rates, prod(output), prod(read)

        def seconds(elements: float, flops: float = 0.0, rate: float = 1.0) -> float:
            return rates.call_s + max(elements * FLOAT_BYTES / rates.memory_bytes_per_s, flops / rate)

        fused = seconds(3 * made) if getattr(layer, "activation", None) else 0.0
        match layer:
            case ConvSpec():
                area = prod(layer.kernel_size) * read[3] // layer.groups
                flops, touched = 2.0 * made * area, made + seen + output[3] * area
                return Passes(
                    seconds(touched, flops, rates.conv_forward_flops_per_s),
                    fused,
                    seconds(touched, flops, rates.conv_weight_gradient_flops_per_s),
                    seconds(touched, flops, rates.conv_input_gradient_flops_per_s),
                )
            case LinearSpec():
                one = seconds(made + seen + output[1] * read[1], 2.0 * made * read[1], rates.linear_flops_per_s)
                return Passes(one, fused, one, one)
            case BatchNormSpec():
                return Passes(seconds(4 * seen), 0.0, 0.0, seconds(6 * seen))
            case AddSpec():
                return Passes(seconds(3 * made), fused, 0.0, 0.0)
            case ActivationSpec():
                return Passes(seconds(2 * made), seconds(3 * made), 0.0, 0.0)
            case PoolSpec() | GlobalAveragePoolSpec() | DropoutSpec() | ShortcutSpec():
                return Passes(seconds(made + seen), 0.0, 0.0, seconds(made + seen))
        return Passes()


def _read_size(layer: LayerSpec, extent: Extent) -> tuple[int, int]:
    """Return about how many rows and columns are read for an extent."""
    if isinstance(layer, GlobalAveragePoolSpec):
        return layer.input_shape[0], layer.input_shape[1]
    down, across = getattr(layer, "stride", (1, 1))
    return extent.rows * down, extent.columns * across
