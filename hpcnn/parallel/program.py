"""A model and a plan, compiled to a flat list of operations: forward runs it, backward runs it reversed.

Legend: N samples of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from hpcnn import arrays, ops
from hpcnn.arrays import Array
from hpcnn.comm.collectives import allreduce
from hpcnn.comm.world import World
from hpcnn.errors import PlanError
from hpcnn.gpu import Copies, CopyStream, Upload, Uploads
from hpcnn.nn.context import StepContext
from hpcnn.nn.layer import Layer
from hpcnn.nn.loss import SoftmaxCrossEntropy
from hpcnn.nn.model import Model
from hpcnn.nn.partial import PartialSum
from hpcnn.nn.separation import FeatureLoss
from hpcnn.parallel.exchange import Exchange, Update
from hpcnn.parallel.narrow import Narrower
from hpcnn.parallel.operations import (
    Operation,
    compile_operations,
    refuse_cut_features,
    refuse_local_statistics,
    refuse_narrow,
)
from hpcnn.parallel.probe import UNWATCHED, Quiet, Watch
from hpcnn.parallel.route import Border, Route, make_route
from hpcnn.parallel.turns import make_turns
from hpcnn.parallel.widen import cast
from hpcnn.plan.layout import Box, extent, volume
from hpcnn.plan.planner import Plan
from hpcnn.spec import INPUT
from hpcnn.timeline import OFF, Timeline


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
    feature_loss : FeatureLoss, optional
        A term that training adds to the loss; the plan must leave its features uncut.
    sync_batchnorm : bool
        Batch-norm statistics of the global batch (True) or of this rank's samples.
    algorithm : str
        Of all-gathers and reduce-scatters between layers.

    Attributes
    ----------
    copies : Copies or None
        Bring images to a GPU; None: a stream of their own, made with the first.
    losses : ndarray of float64
        This rank's shares of the last batch's loss, one number for each part of the batch that is summed apart.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        world: World,
        exchange: Exchange,
        *,
        label_smoothing: float = 0.0,
        feature_loss: FeatureLoss | None = None,
        sync_batchnorm: bool = True,
        algorithm: str = "auto",
    ) -> None:
        if plan.ranks != world.size:
            raise PlanError(
                f"plan: made for {plan.ranks} ranks but {world.size} were started; both must be equal. Save a new plan."
            )
        self.model = model
        self.plan = plan
        self.world = world
        self.exchange = exchange
        self.operations = compile_operations(model, make_turns(model, plan, world.rank))
        self.timeline: Timeline = OFF
        self._watch: Watch = UNWATCHED
        self._told: Exchange | Quiet = exchange  # of every event of a pass
        self.copies: Copies | None = None
        self._uploads: Uploads | None = None
        self._makers = {operation.output: index for index, operation in enumerate(self.operations)}
        self._loss = SoftmaxCrossEntropy(label_smoothing)
        self.losses = np.zeros(1)
        self.feature_loss = feature_loss
        self._sync_batchnorm = sync_batchnorm
        self._algorithm = algorithm
        self._routes: dict[int, Route] = {}
        self._cut = plan.cut
        refuse_narrow(self.operations, model.activation)
        if feature_loss is not None:
            refuse_cut_features(feature_loss.layer, model.spec, plan, self.operations)
        if not sync_batchnorm:
            refuse_local_statistics(model.spec, plan)

    def context(self, *, training: bool, seed: int, step: int, samples: np.ndarray, global_batch: int) -> StepContext:
        """Return what the layers may know of a step; statistics are summed over ranks if they are synchronised.

        Parameters
        ----------
        samples : ndarray of int, shape (N,)
            Of the whole batch, on every rank.
        """
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
        images: np.ndarray | Upload,
        labels: Array,
        context: StepContext,
        update: Update,
        between: Callable[[float, int], None] = lambda loss, num_correct: None,
    ) -> tuple[float, int]:
        """Run forward, loss and backward, while the exchange moves parameters by `update`, or later (collective).

        Parameters
        ----------
        images : ndarray, shape (n, H, W, C), or what `upload` made of it
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
        route = self.route(len(context.samples))
        logits, features, saved = self._forward(images, context, route)
        loss, num_correct, grad_logits = self._lose(logits, labels, context)
        grad_features = None
        if self.feature_loss is not None and features is not None:
            with self.timeline.span("feature loss", "compute"):
                share, grad_features = self.feature_loss.forward(features, labels, context)
            loss, self.losses[0] = loss + share, loss + share
        between(loss, num_correct)
        self.exchange.begin_backward(update)
        self._backward(grad_logits, grad_features, saved, context, route)
        self.exchange.end_backward()
        return loss, num_correct

    def upload(self, images: np.ndarray) -> np.ndarray | Upload:
        """Begin to bring images to where the model computes, and return what the steps take instead of them.

        They are on their way while the caller goes on; `images` may change afterwards.
        """
        like = self.model.parameters.values
        if arrays.on_host(like):
            return images
        if self._uploads is None:
            self._uploads = Uploads(CopyStream() if self.copies is None else self.copies, like)
        return self._uploads.begin(images)

    def _input(self, images: np.ndarray | Upload) -> Array:
        """Return the images where the model computes, as activations."""
        x = images if isinstance(images, Upload) else self.upload(images)
        if isinstance(x, Upload):
            return cast(x.array(), self.model.activation)
        return x.astype(self.model.activation, copy=False)

    def predict(self, images: np.ndarray | Upload, context: StepContext) -> Array:
        """Return the logits of this rank's samples, with running statistics and no dropout (collective).

        Returns
        -------
        Array, shape (n, classes)
            Of the positions `route(N).labels` of the batch.
        """
        return self._forward(images, context, self.route(len(context.samples)))[0]

    def features(self, images: np.ndarray | Upload, context: StepContext) -> tuple[Array, Array]:
        """Return what `predict` does, and the features that `feature_loss` reads, shape (n, ...) (collective)."""
        logits, features, _ = self._forward(images, context, self.route(len(context.samples)))
        assert features is not None, "a program without a feature loss has no features"
        return logits, features

    def evaluate(self, images: np.ndarray | Upload, labels: Array, context: StepContext) -> tuple[float, int]:
        """Return this rank's share of the loss, divided by the context's global batch, and its correct answers.

        Arguments are those of `train_step` (collective).
        """
        return self._lose(self.predict(images, context), labels, context)[:2]

    def probe(self, images: np.ndarray | Upload, labels: Array, context: StepContext, watch: Watch) -> None:
        """Show outputs, and if `context.training` errors, to `watch`; leave no trace in the training (collective).

        Parameters have to be current (`exchange.settle`); errors are of the loss of logits alone. Other arguments are
        those of `train_step`.
        """
        route = self.route(len(context.samples))
        kept = {name: np.array(arrays.to_host(own)) for name, own in self.model.statistics.items()}
        self._told, self._watch = Quiet(), watch
        try:
            logits, _, saved = self._forward(images, context, route)
            if context.training:
                self._backward(self._lose(logits, labels, context)[2], None, saved, context, route)
        finally:
            self._told, self._watch = self.exchange, UNWATCHED
            for name, own in kept.items():
                arrays.overwrite(self.model.statistics[name], own)

    def _lose(self, logits: Array, labels: Array, context: StepContext) -> tuple[float, int, Array]:
        found = self._loss.forward(logits, labels, context.global_batch) if len(logits) else (0.0, 0, logits)
        self.losses[0] = found[0]
        return found

    def route(self, num_samples: int) -> Route:
        """Return how a batch of so many samples is computed; the first time this is collective."""
        if num_samples not in self._routes:
            placement = self.plan.place(self.model.spec, num_samples)
            self._routes[num_samples] = make_route(
                self.model, placement, self.world, self._algorithm, overlap=self.exchange.overlap
            )
        return self._routes[num_samples]

    def average_statistics(self) -> None:
        """Make running statistics equal on all ranks where each has followed its own samples (collective then)."""
        if self._sync_batchnorm or self.world.size == 1:
            return
        for layer in self.model.layers:
            cut = self._cut[layer.spec.name]
            for statistics in layer.statistics.values():
                total = statistics.astype(np.float64)
                self.sum_over_ranks(total, cut)
                statistics[...] = total * cut / self.world.size

    def sum_over_ranks(self, array: np.ndarray, cut: int = 1) -> None:
        """Sum a small array over all ranks in place, or every `cut`-th, with equal bits on them (collective)."""
        ranks = range(self.world.rank % cut, self.world.size, cut) if cut > 1 else None
        allreduce(self.world.comm, array, "butterfly", label="sum over ranks", ranks=ranks)

    def _of_box(self, context: StepContext, layer: str, box: Box) -> StepContext:
        """Return what a layer knows: the samples of its box; its statistics are summed over ranks with its channels."""
        start, stop = box[0]
        cut, known = self._cut[layer], context
        if stop - start != len(context.samples):
            known = replace(known, samples=context.samples[start:stop])
        if cut > 1 and context.reduce_sum is not None:
            alone = cut == self.world.size
            known = replace(known, reduce_sum=None if alone else partial(self.sum_over_ranks, cut=cut))
        return known

    def _forward(
        self, images: np.ndarray | Upload, context: StepContext, route: Route
    ) -> tuple[Array, Array | None, list[object]]:
        """Return the logits of this rank's share of the loss, the features if any, and what each operation saved."""
        features, wanted = None, None if self.feature_loss is None else self.feature_loss.layer
        values: dict[str, Array] = {INPUT: self._input(images)}
        saved: list[object] = []
        narrower = Narrower(route.cuts, values)
        for operation in self.operations:
            values[operation.output], kept = self._run(operation, values, context, route)
            self._watch.output(operation.output, values[operation.output])
            saved.append(kept if context.training else None)
            if operation.output == wanted:
                features = values[wanted]
            for dead in operation.last_use:
                del values[dead]
                if dead != INPUT:
                    index = self._makers[dead]
                    saved[index] = narrower.narrow(self.operations[index].layer, saved[index])
        saved[-1] = narrower.narrow(self.operations[-1].layer, saved[-1])
        logits = values[self.operations[-1].output]
        route.loss.begin(logits)
        return route.loss.end(logits), features, saved

    def _run(
        self, operation: Operation, values: dict[str, Array], context: StepContext, route: Route
    ) -> tuple[Array, object]:
        """Return what an operation makes on this rank, and what it saved."""
        layer, name = operation.layer, operation.output
        borders, pieces = route.borders[operation.first], route.pieces.get(name)
        for border in borders:
            border.begin(values[border.source])
        for trained in operation.trained:
            self._told.parameters_needed(trained)
        output = None if pieces is None else pieces.begin(values[pieces.source], context, self.timeline)
        inputs = tuple(border.end(values[border.source]) for border in borders)
        if layer.parameters and context.training and operation.first == name:
            self._told.input_ready(name, inputs[0])
        if pieces is not None:
            return output, pieces.end(output, inputs[0], context, self.timeline)
        box, kept = route.computed[name], None
        if volume(box) or (layer.joint_backward and context.training):
            with self.timeline.span(f"{name} forward", "compute"):
                output, kept = layer.forward(inputs, self._of_box(context, name, box))
        else:
            output = arrays.empty(extent(box), inputs[0].dtype, like=inputs[0])
        if isinstance(layer, PartialSum):
            return layer.complete(route.sums[name].complete(output), kept)
        return output, kept

    def _backward(
        self,
        grad_logits: Array,
        grad_features: Array | None,
        saved: list[object],
        context: StepContext,
        route: Route,
    ) -> None:
        # Of each value, what its readers have returned so far: borders that may still be on their way.
        returned: dict[str, list[tuple[Border, Array]]] = {}
        exchange = self._told

        def give_back(border: Border, grad: Array) -> None:
            border.begin_back(grad)
            returned.setdefault(border.source, []).append((border, grad))

        give_back(route.loss, grad_logits)
        if self.feature_loss is not None and grad_features is not None:
            source = self.feature_loss.layer
            give_back(Border.within(source, route.returned[source]), grad_features)
        for operation in reversed(self.operations):
            name, kept = operation.output, saved.pop()
            layer = route.layers_back.get(name, operation.layer)
            if name not in returned:  # nothing below has parameters
                continue
            grad_output, *others = [border.end_back(grad) for border, grad in returned.pop(name)]
            for other in others:
                grad_output = ops.add_forward(grad_output, other) if other.size else grad_output
            box = route.returned[name]
            runs, here = volume(box) > 0, self._of_box(context, name, box)
            error = grad_output
            if runs:
                with self.timeline.span(f"{name} error", "compute"):
                    error = layer.error(grad_output, kept, here)
            self._watch.error(name, error)
            if isinstance(layer, PartialSum):
                error = route.sums[name].spread(error)
            if layer.parameters and operation.first == name:
                exchange.error_ready(name, error)
            wants_gradient = layer.parameters and not layer.joint_backward and exchange.wants_gradient(name)
            borders = route.borders[operation.first]
            first = wants_gradient and not any(border.moves_back for border in borders)
            if first:
                self._backward_weight(layer, error, kept, here, runs=runs)
            if operation.needs_input_gradient or layer.joint_backward:
                if runs or layer.joint_backward:
                    with self.timeline.span(f"{name} input gradient", "compute"):
                        grads = layer.backward_input(error, kept, here)
                else:
                    grads = tuple(error.reshape(border.reached_shape) for border in borders)
                if operation.needs_input_gradient:
                    for border, grad in zip(borders, grads, strict=True):
                        give_back(border, grad)
            if wants_gradient and not first:  # while the input's travels
                self._backward_weight(layer, error, kept, here, runs=runs)
            for trained in reversed(operation.trained):
                if layer.joint_backward:
                    exchange.gradient_ready(trained)
                exchange.backward_done(trained)

    def _backward_weight(
        self, layer: Layer[Any], error: Array, kept: object, context: StepContext, *, runs: bool
    ) -> None:
        """Overwrite the layer's gradients and tell the exchange."""
        name = layer.spec.name
        if runs:
            with self.timeline.span(f"{name} weight gradient", "compute"):
                layer.backward_weight(error, kept, context)
        else:
            for parameter in layer.parameters.values():
                parameter.grad[...] = 0
        self._told.gradient_ready(name)
