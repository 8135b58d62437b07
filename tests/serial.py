"""Runs a model in one process, all samples at once: the plain answer that split runs are compared with."""

from __future__ import annotations

import numpy as np

from hpcnn.nn.context import StepContext
from hpcnn.nn.loss import SoftmaxCrossEntropy
from hpcnn.nn.model import Model
from hpcnn.spec import INPUT


def context(count: int, *, training: bool = True, seed: int = 1, step: int = 0, **fields) -> StepContext:
    """Return the context of a whole batch of `count` samples; `fields` replace what follows from that."""
    fields = {"samples": np.arange(count), "global_batch": count} | fields
    return StepContext(training=training, seed=seed, step=step, **fields)


def forward(model: Model, images: np.ndarray, step: StepContext) -> tuple[np.ndarray, list]:
    """Return the logits, and what each layer saved."""
    values, saved = {INPUT: images}, []
    for layer in model.layers:
        values[layer.spec.name], kept = layer.forward(tuple(values[name] for name in layer.spec.inputs), step)
        saved.append(kept)
    return values[model.layers[-1].spec.name], saved


def backward(model: Model, grad_logits: np.ndarray, saved: list, step: StepContext) -> np.ndarray:
    """Overwrite the gradients of all parameters and return that of the images."""
    grads = {model.layers[-1].spec.name: grad_logits}
    for layer, kept in zip(reversed(model.layers), reversed(saved), strict=True):
        error = layer.error(grads.pop(layer.spec.name), kept, step)
        layer.backward_weight(error, kept, step)
        for name, grad in zip(layer.spec.inputs, layer.backward_input(error, kept, step), strict=True):
            grads[name] = grads[name] + grad if name in grads else grad
    return grads[INPUT]


def loss_and_gradients(
    model: Model, images: np.ndarray, labels: np.ndarray, step: StepContext, label_smoothing: float = 0.0
) -> tuple[float, int, np.ndarray]:
    """Return loss, number of correct answers, and the gradient of the images; overwrite the parameters' gradients."""
    logits, saved = forward(model, images, step)
    loss, correct, grad_logits = SoftmaxCrossEntropy(label_smoothing).forward(logits, labels, step.global_batch)
    return loss, correct, backward(model, grad_logits, saved, step)
