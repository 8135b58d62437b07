"""The program runs a model's layers in order, tells the exchange what happens when, and lets values go in time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hpcnn.arrays import Array
from hpcnn.geometry import Block
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.parallel.exchange import Exchange, Update
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.parallel.operations import compile_operations
from hpcnn.parallel.program import Program
from hpcnn.plan.buckets import make_buckets
from hpcnn.plan.planner import make_plan
from hpcnn.spec import INPUT


class OneRank:
    """Stands for the world of a single rank, so that no MPI is needed."""

    rank, size, comm = 0, 1, None


class Nothing:
    """Moves no parameter."""

    together = False

    def look(self, counted: Sequence[Block]) -> None: ...

    def move(self, block: Block) -> None: ...


class Recorder(Exchange):
    """Writes down every event."""

    def __init__(self, model: Model) -> None:
        super().__init__([Carrier(bucket) for bucket in make_buckets(model.spec.layers, 1)], None)
        self.events: list[tuple[str, str]] = []
        self.model = model

    def parameters_needed(self, layer: str) -> None:
        self.events.append(("parameters_needed", layer))

    def input_ready(self, layer: str, x: Array) -> None:
        self.events.append(("input_ready", layer))

    def error_ready(self, layer: str, error: Array) -> None:
        self.events.append(("error_ready", layer))

    def gradient_ready(self, layer: str) -> None:
        for name, (start, stop) in self.model.parameters.offsets.items():
            if name.startswith(f"{layer}/"):
                assert np.all(np.isfinite(self.model.parameters.grads[start:stop])), "announced before it was there"
        self.events.append(("gradient_ready", layer))
        super().gradient_ready(layer)

    def backward_done(self, layer: str) -> None:
        self.events.append(("backward_done", layer))
        super().backward_done(layer)

    def begin_backward(self, update: Update) -> None:
        self.events.append(("begin_backward", ""))
        super().begin_backward(update)

    def end_backward(self) -> None:
        self.events.append(("end_backward", ""))
        super().end_backward()


def make(name: str = "resnet20", shape: tuple[int, int, int] = (8, 8, 3), dtype: type = np.float32) -> Program:
    spec = models.build(name, shape, 4)
    model = Model(spec, 7, dtype)
    return Program(model, make_plan(spec, "data", 1, 6), OneRank(), Recorder(model))  # type: ignore[arg-type]


def step(program: Program, training: bool = True, seed: int = 0) -> tuple[float, int]:
    draw = np.random.default_rng(seed)
    images = draw.standard_normal((6, *program.model.spec.input_shape))
    labels = draw.integers(0, 4, 6)
    context = program.context(training=training, seed=1, step=0, samples=np.arange(6), global_batch=6)
    return (
        program.train_step(images, labels, context, Nothing())
        if training
        else program.evaluate(images, labels, context)
    )


def test_events_come_in_order_for_every_layer_with_parameters() -> None:
    program = make()
    program.model.parameters.grads.fill(np.nan)
    step(program)
    names = [layer.spec.name for layer in program.model.layers if layer.parameters]
    events = program.exchange.events  # type: ignore[attr-defined]
    half = 2 * len(names)
    assert events[:half] == [(event, name) for name in names for event in ("parameters_needed", "input_ready")]
    announced = ("error_ready", "gradient_ready", "backward_done")
    back = [(event, name) for name in reversed(names) for event in announced]
    assert events[half:] == [("begin_backward", ""), *back, ("end_backward", "")]
    assert np.all(np.isfinite(program.model.parameters.grads))


def test_evaluation_only_asks_for_parameters() -> None:
    program = make()
    step(program, training=False)
    assert {event for event, _ in program.exchange.events} == {"parameters_needed"}  # type: ignore[attr-defined]


def test_every_value_is_let_go_by_its_last_reader_and_by_nobody_else() -> None:
    model = make().model
    operations = compile_operations(model)
    dropped = [name for operation in operations for name in operation.last_use]
    assert sorted(dropped) == sorted([INPUT, *(operation.output for operation in operations[:-1])])
    for index, operation in enumerate(operations):
        later = {name for other in operations[index + 1 :] for name in other.inputs}
        assert not later.intersection(operation.last_use)


def test_only_layers_that_read_the_images_alone_skip_the_input_gradient() -> None:
    skipped = [operation.output for operation in compile_operations(make().model) if not operation.needs_input_gradient]
    assert skipped == ["conv1"]


@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_the_gradient_of_the_whole_program_agrees_with_central_differences(name: str) -> None:
    shape = (28, 28, 1) if name == "lenet5" else (8, 8, 3)
    program = make(name, shape, np.float64)
    step(program)
    parameters = program.model.parameters
    gradient = parameters.grads.copy()
    draw = np.random.default_rng(3)
    for index in draw.choice(parameters.values.size, 12, replace=False):
        kept = parameters.values[index]
        ends = []
        for shift in (1e-7, -1e-7):  # so small that next to no ReLU tips over
            parameters.values[index] = kept + shift
            ends.append(step(program)[0])
        parameters.values[index] = kept
        expected = (ends[0] - ends[1]) / 2e-7
        assert gradient[index] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_loss_shares_of_the_parts_of_a_batch_add_up() -> None:
    program = make("lenet5", (28, 28, 1), np.float64)
    draw = np.random.default_rng(0)
    images, labels = draw.standard_normal((6, 28, 28, 1)), draw.integers(0, 4, 6)

    def share(part: slice) -> float:
        samples = np.arange(6)[part]
        context = program.context(training=True, seed=1, step=0, samples=samples, global_batch=6)
        return program.train_step(images[part], labels[part], context, Nothing())[0]

    assert share(slice(0, 1)) + share(slice(1, 6)) == pytest.approx(share(slice(0, 6)), rel=1e-12)
