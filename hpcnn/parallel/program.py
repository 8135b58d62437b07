"""A model and a plan, compiled to a flat list of operations: forward runs it, backward runs it reversed.

Legend: N samples of the global batch, n of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcnn import ops
from hpcnn.arrays import Array
from hpcnn.comm.collectives import allreduce
from hpcnn.comm.world import World
from hpcnn.errors import PlanError
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer
from hpcnn.nn.loss import SoftmaxCrossEntropy
from hpcnn.nn.model import Model
from hpcnn.parallel.exchange import Exchange, Update
from hpcnn.plan.planner import Plan
from hpcnn.spec import INPUT
from hpcnn.timeline import OFF, Timeline


@dataclass(frozen=True)
class Operation:
    """One local layer: which values it reads, which it makes, and which it is the last to read."""

    layer: Layer[Any]
    inputs: tuple[str, ...]
    output: str
    last_use: tuple[str, ...]
    needs_input_gradient: bool


class Program:
    """The steps of training and evaluation on this rank.

    Parameters
    ----------
    model : Model
        Layers with their parameters.
    plan : Plan
        One layout per layer, for as many ranks as `world` has.
    world : World
        The ranks.
    exchange : Exchange
        Makes gradients global and parameters current; hears of every event of a step.
    label_smoothing : float
        Share of the target probability spread over all classes.
    sync_batchnorm : bool
        Batch-norm statistics of the global batch (True) or of this rank's samples.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        world: World,
        exchange: Exchange,
        *,
        label_smoothing: float = 0.0,
        sync_batchnorm: bool = True,
    ) -> None:
        if plan.ranks != world.size:
            raise PlanError(
                f"plan: made for {plan.ranks} ranks but {world.size} were started; both must be equal. Save a new plan."
            )
        self.model = model
        self.plan = plan
        self.world = world
        self.exchange = exchange
        self.operations = compile_operations(model)
        self.timeline: Timeline = OFF
        self._loss = SoftmaxCrossEntropy(label_smoothing)
        self._sync_batchnorm = sync_batchnorm

    def context(self, *, training: bool, seed: int, step: int, samples: np.ndarray, global_batch: int) -> StepContext:
        """Return what the layers may know of a step; statistics are summed over ranks if they are synchronised."""
        together = training and self._sync_batchnorm and self.world.size > 1
        return StepContext(
            training=training,
            seed=seed,
            step=step,
            samples=samples,
            global_batch=global_batch,
            reduce_sum=self.sum_over_ranks if together else None,
        )

    def train_step(
        self,
        images: Array,
        labels: Array,
        context: StepContext,
        update: Update,
        between: Callable[[float, int], None] = lambda loss, num_correct: None,
    ) -> tuple[float, int]:
        """Run forward, loss and backward, while the exchange moves parameters by `update` (collective).

        Some may move only during the next step's forward; `exchange.settle` waits for all.

        Parameters
        ----------
        images : Array, shape (n, H, W, C)
            This rank's samples.
        labels : Array of int, shape (n,)
        between : callable
            Called with what will be returned, between forward and backward: no gradient is on its way yet.

        Returns
        -------
        loss : float
            This rank's share of the global mean loss: the ranks' values add up to it.
        num_correct : int
            Of this rank's samples.
        """
        logits, saved = self._forward(images, context)
        loss, num_correct, grad_logits = self._loss.forward(logits, labels, context.global_batch)
        between(loss, num_correct)
        self.exchange.begin_backward(update)
        self._backward(grad_logits, saved, context)
        self.exchange.end_backward()
        return loss, num_correct

    def predict(self, images: Array, context: StepContext) -> Array:
        """Return the logits of this rank's samples, shape (n, classes), with running statistics and no dropout."""
        return self._forward(images, context)[0]

    def evaluate(self, images: Array, labels: Array, context: StepContext) -> tuple[float, int]:
        """Return this rank's share of the loss (divided by the context's global batch) and its correct answers."""
        loss, num_correct, _ = self._loss.forward(self.predict(images, context), labels, context.global_batch)
        return loss, num_correct

    def average_statistics(self) -> None:
        """Make running statistics equal on all ranks where each has followed its own samples (collective then)."""
        if self._sync_batchnorm or self.world.size == 1:
            return
        for statistics in self.model.statistics.values():
            total = statistics.astype(np.float64)
            self.sum_over_ranks(total)
            statistics[...] = total / self.world.size

    def sum_over_ranks(self, array: np.ndarray) -> None:
        """Sum a small array over all ranks in place, with equal bits everywhere (collective)."""
        allreduce(self.world.comm, array, "butterfly", label="sum over ranks")

    def _forward(self, images: Array, context: StepContext) -> tuple[Array, list[object]]:
        values: dict[str, Array] = {INPUT: images.astype(self.model.parameters.values.dtype, copy=False)}
        saved: list[object] = []
        exchange = self.exchange
        for operation in self.operations:
            layer = operation.layer
            inputs = tuple(values[name] for name in operation.inputs)
            if layer.parameters:
                exchange.parameters_needed(operation.output)
                if context.training:
                    exchange.input_ready(operation.output, inputs[0])
            with self.timeline.span(f"{operation.output} forward", "compute"):
                values[operation.output], kept = layer.forward(inputs, context)
            saved.append(kept if context.training else None)
            for name in operation.last_use:
                del values[name]
        return values[self.operations[-1].output], saved

    def _backward(self, grad_logits: Array, saved: list[object], context: StepContext) -> None:
        grads: dict[str, Array] = {self.operations[-1].output: grad_logits}
        exchange = self.exchange
        for operation in reversed(self.operations):
            layer, kept = operation.layer, saved.pop()
            with self.timeline.span(f"{operation.output} error", "compute"):
                error = layer.error(grads.pop(operation.output), kept, context)
            if layer.parameters:
                exchange.error_ready(operation.output, error)
            if layer.parameters and not layer.joint_backward and exchange.wants_gradient(operation.output):
                with self.timeline.span(f"{operation.output} weight gradient", "compute"):
                    layer.backward_weight(error, kept, context)
                exchange.gradient_ready(operation.output)
            if operation.needs_input_gradient or layer.joint_backward:
                with self.timeline.span(f"{operation.output} input gradient", "compute"):
                    for name, grad in zip(operation.inputs, layer.backward_input(error, kept, context), strict=True):
                        grads[name] = ops.add_forward(grads[name], grad) if name in grads else grad
            if layer.joint_backward:
                exchange.gradient_ready(operation.output)
            if layer.parameters:
                exchange.backward_done(operation.output)


def compile_operations(model: Model) -> tuple[Operation, ...]:
    """Return the model's layers as operations.

    Each knows which values die with it, and whether its input needs a gradient: the images do not.
    """
    last_reader: dict[str, str] = {}
    trained_above: set[str] = set()
    for layer in model.layers:
        for name in layer.spec.inputs:
            last_reader[name] = layer.spec.name
        if layer.parameters or trained_above.intersection(layer.spec.inputs):
            trained_above.add(layer.spec.name)
    return tuple(
        Operation(
            layer=layer,
            inputs=layer.spec.inputs,
            output=layer.spec.name,
            last_use=tuple(name for name, reader in last_reader.items() if reader == layer.spec.name),
            needs_input_gradient=bool(trained_above.intersection(layer.spec.inputs)),
        )
        for layer in model.layers
    )
