"""Measures the layers of a model as plans would split them: the timings of `plan.machine.Machine`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from hpcnn import arrays
from hpcnn.analysis.profile_links import significant
from hpcnn.analysis.stopwatch import Stopwatch
from hpcnn.arrays import Shape
from hpcnn.errors import PlanError
from hpcnn.nn.build import build
from hpcnn.nn.context import StepContext
from hpcnn.nn.parameter import ParameterSet
from hpcnn.plan.layout import extent, volume
from hpcnn.plan.machine import Timing
from hpcnn.plan.parts import part
from hpcnn.plan.planner import PRESETS, Plan, make_plan
from hpcnn.plan.work import extent_of, signature
from hpcnn.spec import FlattenSpec, LayerSpec, ModelSpec, PartialSumSpec


def profile_layers(
    watch: Stopwatch,
    model: ModelSpec,
    global_batch: int,
    *,
    presets: Sequence[str] = tuple(PRESETS),
    seconds: float = 60.0,
) -> tuple[Timing, ...]:
    """Return the timings of a model's layers, in the sizes in which presets split them (collective).

    Parameters
    ----------
    watch : Stopwatch
        Of the ranks, as they would be started for training; all of them compute at the same time.
    presets : sequence of str
        Those that cannot split the model are left out.
    seconds : float
        About how long it may take; what has not been measured by then is left out.
    """
    found, begin = [], time.perf_counter()
    for layer, output, read in _cases(model, presets, watch.world.size, global_batch):
        if watch.slowest([time.perf_counter() - begin])[0] > seconds:
            break
        times = time_passes(layer, output, read, watch)
        found.append(Timing(layer=signature(layer), extent=extent_of(output, read), seconds=times))
    return tuple(found)


def _cases(
    model: ModelSpec, presets: Sequence[str], ranks: int, global_batch: int
) -> Iterator[tuple[LayerSpec, Shape, Shape]]:
    """Yield every layer that differs from those before, as the rank that computes most has it, with its shapes."""
    seen = set()
    for preset in presets:
        try:
            plan = make_plan(model, preset, ranks, global_batch)
        except PlanError:
            continue
        for layer, output, read in _parts(model, plan):
            key = (signature(layer), output, read)
            if key not in seen and not isinstance(layer, FlattenSpec):
                seen.add(key)
                yield layer, output, read


def _parts(model: ModelSpec, plan: Plan) -> Iterator[tuple[LayerSpec, Shape, Shape]]:
    placed = plan.place(model, plan.global_batch)
    for layer, (name, layout) in zip(model.layers, plan.layouts, strict=True):
        made = placed.layers[name].partial
        rank = max(range(layout.ranks), key=lambda rank: volume(made[rank]))
        spec = part(layer, layout, made[rank], rank).spec
        if isinstance(spec, PartialSumSpec):
            spec = replace(spec.product, activation=spec.activation)
        yield spec, extent(made[rank]), extent(placed.layers[name].needed[rank])


def time_passes(layer: LayerSpec, output: Shape, read: Shape, watch: Stopwatch) -> tuple[float, float, float, float]:
    """Return the seconds of a layer's four passes, in the order of `Timing` (collective)."""
    draw = np.random.default_rng(1)
    parameters = ParameterSet.of([layer])
    parameters.values[...] = 0.01 * draw.standard_normal(parameters.values.size, np.float32)
    made, size = build(layer, parameters), output[0]
    context = StepContext(training=True, seed=1, step=0, samples=np.arange(size), global_batch=size)
    inputs = tuple(arrays.empty(read) for _ in layer.inputs)
    for x in inputs:
        x[...] = draw.standard_normal(read, np.float32)
    y, saved = made.forward(inputs, context)
    grad = arrays.empty(y.shape)
    grad[...] = draw.standard_normal(y.shape, np.float32)
    error = made.error(grad, saved, context)
    forward_s, error_s, weight_s, input_s = watch.seconds(
        [
            lambda: made.forward(inputs, context),
            lambda: made.error(grad, saved, context),
            lambda: made.backward_weight(error, saved, context),
            lambda: made.backward_input(error, saved, context),
        ]
    )
    weight_s *= bool(parameters.values.size)
    return significant(forward_s), significant(error_s), significant(weight_s), significant(input_s)
