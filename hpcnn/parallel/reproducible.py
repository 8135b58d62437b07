"""The program of reproducible runs: a rank computes virtual shard after virtual shard, operation by operation.

The batch is V shards whatever the number of ranks, and a rank has some of them. Every shard is computed by itself, in
arrays and with kernels of its own size, so that its numbers do not depend on who computes it; whatever is summed over
samples (gradients, statistics of batch norm) is summed in a tree over shards, and losses exactly.

Shards go through the operations in lock step, because a batch norm needs the sums of all of them. Inside it they are
nested: the sum that the layer asks for on one shard begins the layer on the next, and the last one's waits for the
other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from hpcnn import arrays, geometry, ops
from hpcnn.arrays import Array
from hpcnn.comm.world import World
from hpcnn.errors import PlanError
from hpcnn.geometry import Block
from hpcnn.gpu import Upload
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer
from hpcnn.nn.model import Model
from hpcnn.parallel.exchange import Exchange
from hpcnn.parallel.operations import Operation
from hpcnn.parallel.program import Program
from hpcnn.parallel.route import Border, Route, make_route
from hpcnn.parallel.tree import SmallSum
from hpcnn.plan.layout import Layout, extent, volume
from hpcnn.plan.planner import Plan
from hpcnn.spec import INPUT

T = TypeVar("T")


class ReproducibleProgram(Program):
    """A program whose results have the same bits on any number of ranks.

    Parameters
    ----------
    num_shards : int
        V; at least as many as ranks.

    Other parameters are those of `Program`. The plan must leave every layer whole and cut the batch only. The exchange
    must sum over as many shards.

    Raises
    ------
    PlanError
        If the plan does more than that, or the batch has fewer samples than shards.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        world: World,
        exchange: Exchange,
        *,
        num_shards: int,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, plan, world, exchange, label_smoothing=label_smoothing)
        if plan.global_batch < num_shards:
            raise PlanError(
                f"plan: train.global_batch (={plan.global_batch}) is smaller than the number of virtual shards"
                f" (={num_shards}); each needs at least one sample. Use fewer shards or a larger batch."
            )
        for name, layout in plan.layouts:
            if layout != Layout(sample=world.size) or plan.turns or plan.exchange:
                raise PlanError(
                    f"plan: layer '{name}' has layout '{layout.name}' (grid {layout.grid}), or some layers have turns"
                    ' or an exchange of their own; train.reproducible needs plan.preset = "data", in which every rank'
                    " has all weights: parts of layers would be summed in an order that depends on the ranks."
                )
        self.losses = np.zeros(num_shards)
        self._mine = geometry.split(num_shards, world.size, world.rank)
        layouts = tuple((name, Layout(sample=num_shards)) for name, _ in plan.layouts)
        self._shards_plan = replace(plan, ranks=num_shards, layouts=layouts)
        self._shard_routes: dict[int, list[Route]] = {}
        self._sums: dict[int, SmallSum] = {}

    def context(self, *, training: bool, seed: int, step: int, samples: np.ndarray, global_batch: int) -> StepContext:
        """Return what the layers may know of a step; how statistics are summed is said shard by shard."""
        return StepContext(training=training, seed=seed, step=step, samples=samples, global_batch=global_batch)

    def route(self, num_samples: int) -> Route:
        """Return what this rank reads and computes of a batch of so many samples: all of its shards."""
        if num_samples not in self._routes:
            placement = self._shards_plan.place(self.model.spec, num_samples)
            routes = [
                make_route(self.model, placement, self.world, self._algorithm, overlap=False, rank=shard)
                for shard in range(*self._mine)
            ]
            self._shard_routes[num_samples] = routes
            # Evaluations may have shards without samples, whose boxes lie anywhere.
            full = [route for route in routes if route.labels.size] or routes[:1]
            samples = Block(full[0].labels.start, full[-1].labels.stop)
            self._routes[num_samples] = replace(
                full[0], images=(samples, *full[0].images[1:]), labels=samples, computed={}, returned={}
            )
        return self._routes[num_samples]

    def predict(self, images: np.ndarray | Upload, context: StepContext) -> Array:
        """Return the logits of this rank's samples, with running statistics and no dropout.

        Returns
        -------
        Array, shape (n, classes)
            Of the positions `route(N).labels` of the batch.
        """
        return np.concatenate(self._forward(images, context, self.route(len(context.samples)))[0])

    def evaluate(self, images: np.ndarray | Upload, labels: Array, context: StepContext) -> tuple[float, int]:
        """Return this rank's share of the loss, divided by the context's global batch, and its correct answers."""
        logits = self._forward(images, context, self.route(len(context.samples)))[0]
        return self._lose(logits, labels, context)[:2]

    # -- forward ----------------------------------------------------------------------------------------------------

    def _forward(  # type: ignore[override]
        self, images: np.ndarray | Upload, context: StepContext, route: Route
    ) -> tuple[list[Array], None, list[list[object]]]:
        """Return the logits of each shard, no features, and what each operation saved of each."""
        routes = self._shard_routes[len(context.samples)]
        whole = self._input(images)
        values: list[dict[str, Array]] = [{INPUT: _copy(whole, each.labels, route.labels)} for each in routes]
        saved: list[list[object]] = []
        contexts = _of_shards(context, routes)
        for operation in self.operations:
            for trained in operation.trained:
                self.exchange.parameters_needed(trained)
            with self.timeline.span(f"{operation.output} forward", "compute"):
                made = self._run_shards(operation, values, contexts, routes)
            for shard, (output, _) in enumerate(made):
                values[shard][operation.output] = output
                for dead in operation.last_use:
                    del values[shard][dead]
            saved.append([kept if context.training else None for _, kept in made])
        last = self.operations[-1].output
        return [route.loss.end(value[last]) for route, value in zip(routes, values, strict=True)], None, saved

    def _run_shards(
        self, operation: Operation, values: list[dict[str, Array]], contexts: list[StepContext], routes: list[Route]
    ) -> list[tuple[Array, object]]:
        """Return what an operation makes and saves of every shard."""
        layer, name = operation.layer, operation.output

        def run(shard: int, reduce_sum: Callable[[Array], None] | None) -> tuple[Array, object]:
            route = routes[shard]
            box = route.computed[name]
            inputs = tuple(border.end(values[shard][border.source]) for border in route.borders[name])
            if not volume(box):
                return arrays.empty(extent(box), inputs[0].dtype, like=inputs[0]), None
            here = contexts[shard]
            return layer.forward(inputs, here if reduce_sum is None else replace(here, reduce_sum=reduce_sum))

        if layer.joint_backward and contexts[0].training:
            return self._nested(run, name)
        return [run(shard, None) for shard in range(len(routes))]

    def _lose(self, logits: list[Array], labels: Array, context: StepContext) -> tuple[float, int, list[Array]]:
        routes = self._shard_routes[len(context.samples)]
        first = self.route(len(context.samples)).labels.start
        correct, grads = 0, []
        self.losses.fill(0.0)
        for shard, route, rows in zip(range(*self._mine), routes, logits, strict=True):
            grad = rows
            if len(rows):
                own = labels[route.labels.start - first : route.labels.stop - first]
                self.losses[shard], num_correct, grad = self._loss.forward(rows, own, context.global_batch)
                correct += num_correct
            grads.append(grad)
        return math.fsum(self.losses), correct, grads

    # -- backward ---------------------------------------------------------------------------------------------------

    def _backward(  # type: ignore[override]
        self,
        grad_logits: list[Array],
        grad_features: None,
        saved: list[list[object]],
        context: StepContext,
        route: Route,
    ) -> None:
        routes = self._shard_routes[len(context.samples)]
        contexts = _of_shards(context, routes)
        returned: list[dict[str, list[tuple[Border, Array]]]] = [{} for _ in routes]
        for shard, (each, grad) in enumerate(zip(routes, grad_logits, strict=True)):
            returned[shard][each.loss.source] = [(each.loss, grad)]
        for operation in reversed(self.operations):
            kept, name = saved.pop(), operation.output
            if name not in returned[0]:  # nothing below has parameters
                continue
            self._go_back(operation, kept, returned, contexts, routes)

    def _go_back(
        self,
        operation: Operation,
        saved: list[object],
        returned: list[dict[str, list[tuple[Border, Array]]]],
        contexts: list[StepContext],
        routes: list[Route],
    ) -> None:
        """Take all shards back through one operation."""
        name, exchange = operation.output, self.exchange
        layers: list[Layer[Any]] = [route.layers_back.get(name, operation.layer) for route in routes]
        joint = operation.layer.joint_backward
        errors = []
        for shard, layer in enumerate(layers):
            grad_output, *others = [border.end_back(grad) for border, grad in returned[shard].pop(name)]
            for other in others:
                grad_output = ops.add_forward(grad_output, other) if other.size else grad_output
            errors.append(layer.error(grad_output, saved[shard], contexts[shard]))
        if operation.layer.parameters and not joint:
            with self.timeline.span(f"{name} weight gradient", "compute"):
                for shard, layer in enumerate(layers):
                    layer.backward_weight(errors[shard], saved[shard], contexts[shard])
                    exchange.shard_ready(name)
            exchange.gradient_ready(name)

        def back(shard: int, reduce_sum: Callable[[Array], None] | None) -> tuple[Array, ...]:
            here = contexts[shard]
            here = here if reduce_sum is None else replace(here, reduce_sum=reduce_sum)
            return layers[shard].backward_input(errors[shard], saved[shard], here)

        if operation.needs_input_gradient or joint:
            with self.timeline.span(f"{name} input gradient", "compute"):
                if joint:
                    grads = self._nested(back, name, summed=lambda: exchange.shard_ready(name))
                else:
                    grads = [back(shard, None) for shard in range(len(routes))]
            for shard, route in enumerate(routes):
                if operation.needs_input_gradient:
                    for border, grad in zip(route.borders[name], grads[shard], strict=True):
                        if border.source != INPUT:
                            returned[shard].setdefault(border.source, []).append((border, grad))
        for trained in operation.trained:
            if joint:
                exchange.gradient_ready(trained)
            exchange.backward_done(trained)

    # -- sums -------------------------------------------------------------------------------------------------------

    def _nested(
        self,
        call: Callable[[int, Callable[[Array], None]], T],
        label: str,
        summed: Callable[[], None] = lambda: None,
    ) -> list[T]:
        """Return what a function returns on every shard here, which asks once for a sum over all shards (collective).

        `summed` is called when a shard has come to its sum, in their order.
        """
        count = self._mine.size
        results: dict[int, T] = {}
        total: np.ndarray | None = None

        def run(shard: int) -> None:
            def reduce_sum(array: Array) -> None:
                nonlocal total
                small = self._small_sum(array.size)
                small.pile.add(array.reshape(-1))
                summed()
                if shard + 1 < count:
                    run(shard + 1)
                else:
                    total = small.result(f"statistics of {label}")
                assert total is not None
                array[...] = total.reshape(array.shape)

            results[shard] = call(shard, reduce_sum)

        run(0)
        return [results[shard] for shard in range(count)]

    def _small_sum(self, count: int) -> SmallSum:
        if count not in self._sums:
            self._sums[count] = SmallSum(count, len(self.losses), self.world)
        return self._sums[count]


def _of_shards(context: StepContext, routes: list[Route]) -> list[StepContext]:
    """Return what the layers may know of each shard; the first one's moves the running statistics."""
    return [
        replace(context, samples=context.samples[slice(*route.labels)], tracks=shard == 0)
        for shard, route in enumerate(routes)
    ]


def _copy(images: Array, samples: Block, held: Block) -> Array:
    """Return the images of a shard in memory of their own, so that they lie alike whoever has them."""
    shape = (samples.size, *images.shape[1:])
    part = arrays.empty(shape, images.dtype, like=images)
    if samples.size:
        part[...] = images[samples.start - held.start : samples.stop - held.start]
    return part
