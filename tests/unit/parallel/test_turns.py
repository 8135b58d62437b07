"""Layers computed tile after tile are the layers computed whole, and hold as little as the formula says."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from hpcnn import arrays, ops
from hpcnn.geometry import output_size
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.nn.models.yolo import yolo16
from hpcnn.parallel.operations import compile_operations
from hpcnn.parallel.program import Program
from hpcnn.parallel.turns import make_turns
from hpcnn.plan.planner import Plan, in_turns, make_plan
from hpcnn.plan.turns import peak_elements
from hpcnn.spec import INPUT, ModelSpec
from tests.chains import CLASSES, in_one_group, in_random_turns, random_chain
from tests.unit.parallel.test_program import Nothing, OneRank, Recorder

SAMPLES = 3


def program_of(spec: ModelSpec, plan: Plan, dtype: type = np.float64) -> Program:
    model = Model(spec, 7, dtype, plan.parts(spec, 0))
    return Program(model, plan, OneRank(), Recorder(model))  # type: ignore[arg-type]


def train(program: Program, samples: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the loss, the logits in evaluation, and all gradients, of which none is left as it was."""
    spec, draw = program.model.spec, np.random.default_rng(2)
    for parameter in program.model.parameters.parameters:
        parameter.value[...] = draw.standard_normal(parameter.value.shape)
    program.model.parameters.grads.fill(np.nan)
    images = draw.standard_normal((samples, *spec.input_shape)).astype(program.model.parameters.values.dtype)
    labels = draw.integers(0, spec.num_classes, samples)
    here = {"seed": 1, "step": 0, "samples": np.arange(samples), "global_batch": samples}
    loss, _ = program.train_step(images, labels, program.context(training=True, **here), Nothing())
    logits = program.predict(images, program.context(training=False, **here))
    return loss, logits, program.model.parameters.grads


@pytest.mark.parametrize("seed", range(100))
def test_loss_and_all_gradients_of_random_chains_are_those_of_whole_layers(seed: int) -> None:
    draw = np.random.default_rng(seed)
    plan = None
    while plan is None:
        spec = random_chain(draw)
        whole = make_plan(spec, "data", 1, SAMPLES)
        plan = in_random_turns(draw, whole, spec)
    expected = train(program_of(spec, whole), SAMPLES)
    found = train(program_of(spec, plan), SAMPLES)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10 * np.abs(theirs).max())


@pytest.mark.parametrize("turns", [(2, 2), (3, 4), (50, 1)])
@pytest.mark.parametrize("name", ["lenet5", "vgg11-32", "alexnet"])
def test_models_train_in_turns(name: str, turns: tuple[int, int]) -> None:
    size = {"lenet5": (28, 28, 1), "vgg11-32": (32, 32, 3), "alexnet": (67, 67, 3)}[name]
    spec = models.build(name, size, CLASSES, 0.25)
    whole = make_plan(spec, "data", 1, 1)
    expected = train(program_of(spec, whole), 1)
    found = train(program_of(spec, in_turns(make_plan(spec, "data", 1, 1), spec, turns)), 1)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10 * np.abs(theirs).max())


def test_every_layer_of_a_group_is_announced_with_the_group() -> None:
    spec = models.build("lenet5", (28, 28, 1), CLASSES)
    program = program_of(spec, in_one_group(make_plan(spec, "data", 1, 6), spec, (2, 2), "pool2"))
    train(program, 6)
    events = program.exchange.events  # type: ignore[attr-defined]
    assert events[:2] == [("parameters_needed", "conv1"), ("parameters_needed", "conv2")]
    back = [event for event in events if event[1].startswith("conv") and event[0] != "parameters_needed"]
    assert back == [(event, name) for name in ("conv2", "conv1") for event in ("gradient_ready", "backward_done")]


def test_a_group_is_one_operation_that_reads_what_its_first_layer_reads() -> None:
    spec = models.build("lenet5", (28, 28, 1), CLASSES)
    plan = in_one_group(make_plan(spec, "data", 1, 6), spec, (2, 2), "pool2")
    model = Model(spec, 7, np.float32, plan.parts(spec, 0))
    first, second, *_ = compile_operations(model, make_turns(model, plan, 0))
    last = plan.turns[0][0]
    assert (first.inputs, first.first, first.output) == ((INPUT,), "conv1", last)
    assert first.trained == ("conv1", "conv2")
    assert second.inputs == (last,)
    assert not first.needs_input_gradient


class Counter:
    """Counts the bytes of arrays that are in use, and the most there were since `restart`."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def restart(self) -> int:
        self.most = self.now
        return self.now

    def change(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.most = max(self.most, self.now)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Return the count of pooled memory under operators that make their results and nothing besides."""
    counted = Counter()

    class Block(arrays._Block):
        def __init__(self, num_bytes: int) -> None:
            super().__init__(num_bytes)
            self.num_bytes = num_bytes
            counted.change(num_bytes)

        def __del__(self) -> None:
            counted.change(-self.num_bytes)
            super().__del__()

    def made(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        array = arrays.empty(shape, dtype)
        array.fill(0)
        return array

    def conv2d_forward(x, weight, bias, *, stride, padding, dilation, activation, **_):
        size = output_size(x.shape[1:3], weight.shape[1:3], stride, padding, dilation)
        return made((len(x), *size, len(weight)))

    def maxpool2d_forward(x, window, *, stride, padding):
        shape = (len(x), *output_size(x.shape[1:3], window, stride, padding), x.shape[3])
        return made(shape), made(shape, np.uint8)

    def maxpool2d_backward(grad, argmax, size, window, **_):
        return made((len(grad), *size, grad.shape[3]))

    def conv2d_backward_input(error, weight, size, **_):
        return made((len(error), *size, weight.shape[3]))

    hollow = {
        "conv2d_forward": conv2d_forward,
        "conv2d_backward_input": conv2d_backward_input,
        "conv2d_backward_weight": lambda *args, out, **_: [grad.fill(0) for grad in out],
        "maxpool2d_forward": maxpool2d_forward,
        "maxpool2d_backward": maxpool2d_backward,
        "activation_backward": lambda grad, y, kind: made(grad.shape),
    }
    for name, stub in hollow.items():
        monkeypatch.setattr(ops, name, stub)
    monkeypatch.setattr(arrays, "_Block", Block)
    monkeypatch.setattr(arrays, "SMALLEST_POOLED_BYTES", 1)
    return counted


def measured(program: Program, counter: Counter, samples: int) -> int:
    """Return the bytes that a second step adds at most to what there is before it."""
    train(program, samples)
    before = counter.restart()
    train(program, samples)
    return counter.most - before


def test_memory_of_the_yolo_layers_falls_as_the_formula_says(counter: Counter) -> None:
    spec = yolo16((608, 608, 3), CLASSES, batchnorm=False)
    whole = make_plan(spec, "data", 1, 1)
    placed = whole.place(spec, 1).layers
    plans = [in_one_group(whole, spec, turns, "conv12") for turns in ((1, 1), (2, 2), (4, 4))]
    plans += [in_turns(whole, spec, turns) for turns in ((2, 2), (4, 4))]
    (group,) = plans[0].groups(spec)
    expected = [peak_elements(group, placed[group.name].computed[0], whole=True)]
    for plan in plans:
        below, most = 0, 0
        for group in plan.groups(spec):
            most = max(most, below + peak_elements(group, placed[group.name].computed[0]))
            below += prod(group.input_shape)
        expected.append(max(most, below + prod(group.output_shape)))
    found = [measured(program_of(spec, plan, np.float32), counter, 1) for plan in [whole, *plans]]
    for ours, theirs in zip(found, expected, strict=True):
        kept = 4 * (theirs - prod(spec.input_shape))  # images are the caller's
        assert kept <= ours <= 1.1 * kept, "the places of maxima come on top, a byte for each"
    assert found[2] < 0.4 * found[0]
    assert found[3] < 0.25 * found[0]
    assert found[5] < found[4] < 0.4 * found[0]
