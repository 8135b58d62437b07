"""Outputs and errors that are collected from a plan are those of one process, and come from devices too."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.analysis.activations import Activations
from hpcnn.analysis.chain import measured_layers
from hpcnn.errors import PlanError
from hpcnn.geometry import split
from hpcnn.nn.loss import SoftmaxCrossEntropy
from hpcnn.nn.model import Model
from hpcnn.ops import backend
from hpcnn.parallel.exchange import Exchange
from hpcnn.parallel.program import Program
from hpcnn.plan.planner import make_plan
from hpcnn.spec import INPUT, ModelSpec
from tests.device import FakeCopies, fake_gpu
from tests.plans import kinds, residual
from tests.serial import context
from tests.worlds import world

N, BATCH = 7, 5
DRAW = np.random.default_rng(5)
IMAGES, LABELS = DRAW.standard_normal((N, 9, 9, 3)), DRAW.integers(0, 10, N)


def reference(spec: ModelSpec, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return all outputs of an evaluation and all errors of a training pass, in one process."""
    model, images = Model(spec, seed, np.float64), cut(spec)
    passes = []
    for training in (False, True):
        step, values, saved = context(N, training=training, seed=0), {INPUT: images}, []
        for layer in model.layers:
            values[layer.spec.name], kept = layer.forward(tuple(values[name] for name in layer.spec.inputs), step)
            saved.append(kept)
        passes.append(values)
    last = model.layers[-1].spec.name
    grads, errors = {last: SoftmaxCrossEntropy(0.0).forward(passes[1][last], LABELS, N)[2]}, {}
    for layer, kept in zip(reversed(model.layers), reversed(saved), strict=True):
        name = layer.spec.name
        errors[name] = layer.error(grads.pop(name), kept, step)
        for source, grad in zip(layer.spec.inputs, layer.backward_input(errors[name], kept, step), strict=True):
            grads[source] = grads[source] + grad if source in grads else grad
    return passes[0], errors


def cut(spec: ModelSpec) -> np.ndarray:
    rows, columns, _ = spec.input_shape
    return np.ascontiguousarray(IMAGES[:, :rows, :columns])


def collect(
    spec: ModelSpec, preset: str, *, errors: bool = True, dtype: type = np.float64, copies: FakeCopies | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    plan = make_plan(spec, preset, world().size, BATCH)
    place = "cpu" if copies is None else "cuda"
    model = Model(spec, 3, dtype, plan.parts(spec, world().rank), place=place)
    program = Program(model, plan, world(), Exchange([], world().engine))  # which is not asked
    program.copies = copies
    seen = Activations(program, measured_layers(spec), np.arange(N), errors=errors)
    route = program.route(N)
    images = cut(spec)[tuple(slice(*block) for block in route.images)].astype(dtype)
    for _ in range(2):  # a second pass finds nothing changed
        found = seen.collect(images, LABELS[slice(*route.labels)])
    return found


@pytest.mark.parametrize("preset", ["data", "hybrid", "model", "spatial"])
@pytest.mark.parametrize("spec", [kinds(10), residual()], ids=["kinds", "residual"])
def test_every_rank_gets_its_channels_of_all_samples(spec: ModelSpec, preset: str) -> None:
    for found, expected in zip(collect(spec, preset), reference(spec, 3), strict=True):
        for layer, value in zip(measured_layers(spec), found, strict=True):
            own = split(layer.output_shape[-1], world().size, world().rank)
            np.testing.assert_allclose(value, expected[layer.name][..., own.start : own.stop], rtol=1e-9, atol=1e-12)


def test_sums_over_cut_inputs_have_outputs_but_no_errors() -> None:
    (found, nothing), (expected, _) = collect(kinds(10), "hybrid-rows", errors=False), reference(kinds(10), 3)
    assert not nothing
    for layer, value in zip(measured_layers(kinds(10)), found, strict=True):
        own = split(layer.output_shape[-1], world().size, world().rank)
        np.testing.assert_allclose(value, expected[layer.name][..., own.start : own.stop], rtol=1e-9, atol=1e-12)
    if world().size > 1:
        with pytest.raises(PlanError, match=r"analysis\.errors"):
            collect(kinds(10), "hybrid-rows")


def test_they_come_from_a_device_as_from_the_host() -> None:
    with backend.use("numpy"):
        expected = collect(kinds(10), "data", dtype=np.float32)
    world().engine.copies = FakeCopies(seed=world().rank)
    try:
        with fake_gpu():
            found = collect(kinds(10), "data", dtype=np.float32, copies=FakeCopies(seed=100 + world().rank))
    finally:
        world().engine.copies = None
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
