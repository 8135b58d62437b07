"""Random models whose layers follow one another, and random groups of them that are computed in turns."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np

from hpcnn.arrays import Pair
from hpcnn.errors import HpcnnError, PlanError
from hpcnn.plan.planner import Plan, checked
from hpcnn.spec import (
    INPUT,
    ActivationSpec,
    ConvSpec,
    GlobalAveragePoolSpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    PoolSpec,
)

CLASSES = 10


def random_layer(draw: np.random.Generator, common: dict) -> LayerSpec:
    """Return a convolution, pooling or activation of random geometry, which may not fit its input."""

    def pair(top: int) -> tuple[int, int]:
        return int(draw.integers(1, top)), int(draw.integers(1, top))

    padding = tuple((int(draw.integers(0, 3)), int(draw.integers(0, 3))) for _ in range(2))
    window = {"stride": pair(3), "padding": padding}
    match draw.choice(["conv", "conv", "conv", "max", "average", "activation"]):
        case "activation":
            return ActivationSpec(**common, kind=str(draw.choice(["relu", "leaky_relu"])))
        case "conv":
            window |= {"kernel_size": pair(5), "dilation": pair(3), "bias": bool(draw.integers(2))}
            activation = draw.choice([None, "relu", "leaky_relu"])
            return ConvSpec(**common, **window, out_channels=int(draw.integers(1, 6)), activation=activation)
        case kind:
            layer = PoolSpec(**common, kind=str(kind), window=pair(5), **window)
            if any(max(pad) >= size for pad, size in zip(padding, layer.window, strict=True)):
                raise HpcnnError("a window would see nothing but padding")
            return layer


def random_chain(draw: np.random.Generator) -> ModelSpec:
    """Return 2 to 6 random layers and a classifier."""
    while True:
        source, shape = INPUT, (*map(int, draw.integers(6, 24, 2)), int(draw.integers(1, 4)))
        layers: list[LayerSpec] = []
        with suppress(HpcnnError):
            for number in range(int(draw.integers(2, 7))):
                layer = random_layer(draw, {"name": f"layer{number}", "inputs": (source,), "input_shape": shape})
                source, shape = layer.name, layer.output_shape
                layers.append(layer)
            layers += [
                GlobalAveragePoolSpec(name="mean", inputs=(source,), input_shape=shape),
                LinearSpec(name="fc", inputs=("mean",), input_shape=shape[2:], out_features=CLASSES),
            ]
            return ModelSpec(name="chain", input_shape=layers[0].input_shape, num_classes=CLASSES, layers=tuple(layers))


def in_random_turns(draw: np.random.Generator, plan: Plan, spec: ModelSpec) -> Plan | None:
    """Return the plan with random groups in turns; None if what was drawn is refused."""
    names = [layer.name for layer in spec.layers[:-2]]
    bounds = [0, *(index for index in range(1, len(names)) if draw.random() < 0.25), len(names)]
    fused, turns = set(plan.fused), []
    for start, stop in pairwise(bounds):
        fused |= {*names[start + 1 : stop]}
        if stop - start > 1:
            turns.append((names[stop - 1], (int(draw.integers(1, 5)), int(draw.integers(1, 4)))))
    with suppress(PlanError):
        return checked(replace(plan, fused=frozenset(fused), turns=tuple(turns)), spec) if turns else None
    return None


def in_one_group(plan: Plan, spec: ModelSpec, turns: Pair, last: str) -> Plan:
    """Return the plan with all layers up to `last` in one group."""
    names = [layer.name for layer in spec.layers]
    fused = names[1 : names.index(last) + 1]
    return checked(replace(plan, fused=plan.fused | {*fused}, turns=((last, turns),)), spec)
