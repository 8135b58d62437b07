"""Whole models against PyTorch: logits, loss, every gradient, running statistics, and updates."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hpcnn.analysis.torch_twin import TorchTwin  # noqa: E402
from hpcnn.nn import models  # noqa: E402
from hpcnn.nn.model import Model  # noqa: E402
from hpcnn.nn.models import resnet  # noqa: E402
from hpcnn.nn.models.builder import GraphBuilder  # noqa: E402
from hpcnn.nn.models.yolo import yolo16  # noqa: E402
from tests.serial import context, forward, loss_and_gradients  # noqa: E402


def uneven_net():
    """Return a net of everything the published ones lack: uneven padding, dilation, leaky sums, average pools."""
    graph = GraphBuilder("uneven", (11, 9, 3))
    first = graph.conv("conv1", 4, (3, 2), padding=((2, 1), (0, 1)), activation="leaky_relu")
    graph.average_pool("pool1", 3, stride=1, padding=1)
    graph.add("add", first, activation="leaky_relu")
    graph.max_pool("pool2", 3, stride=2, padding=1)
    graph.shortcut("short", 6, stride=(2, 1))
    graph.linear("fc1", 8)
    graph.batchnorm("norm", activation="relu")
    graph.linear("fc2", 5)
    return graph.finish(5)


def bottlenecks():
    """Return a narrow net of the blocks of ResNet-50."""
    graph = GraphBuilder("bottlenecks", (13, 12, 3))
    for place, (filters, stride) in enumerate(((4, 1), (4, 1), (6, 2))):
        resnet.bottleneck(graph, f"block{place}", filters, stride)
    graph.global_average_pool("pool")
    graph.linear("fc", 5)
    return graph.finish(5)


NETS = {
    "lenet5": lambda: models.build("lenet5", (28, 28, 1), 10),
    "resnet20": lambda: models.build("resnet20", (16, 20, 3), 10),
    "bottlenecks": bottlenecks,
    "yolo16": lambda: yolo16((16, 32, 3), 10),
    "yolo16 without batchnorm": lambda: yolo16((16, 16, 3), 10, batchnorm=False),
    "uneven": uneven_net,
}


def batch(spec, samples: int, dtype):
    random = np.random.default_rng(7)
    images = random.normal(size=(samples, *spec.input_shape)).astype(dtype)
    return images, random.integers(0, spec.num_classes, samples)


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference, relative to the largest number of the array."""
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() + 1e-30))


def compare(spec, dtype, tolerance: float, samples: int = 4) -> None:
    model, twin = Model(spec, 3, dtype), TorchTwin(spec, dtype=np.dtype(dtype).name)
    twin.load(model.parameters, model.statistics)
    images, labels = batch(spec, samples, dtype)
    assert worst(forward(model, images, context(samples, training=False))[0], twin.forward(images)) < tolerance

    loss, _, _ = loss_and_gradients(model, images, labels, context(samples), label_smoothing=0.1)
    assert twin.backward(images, labels, label_smoothing=0.1) == pytest.approx(loss, rel=tolerance)
    grads = twin.gradients()
    largest = max(float(np.abs(grad).max()) for grad in grads.values())
    assert set(model.parameters.offsets) == set(grads)
    for parameter in model.parameters.parameters:
        theirs = grads[parameter.name]
        assert theirs.shape == parameter.grad.shape
        assert np.abs(parameter.grad - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-3 * largest)
    for name, array in twin.statistics().items():
        assert worst(model.statistics[name], array) < tolerance


@pytest.mark.parametrize("name", NETS)
def test_float64_model_equals_pytorch(name) -> None:
    compare(NETS[name](), np.float64, 1e-9)


@pytest.mark.parametrize(
    ("name", "image"),
    [("lenet5", (28, 28, 1)), ("resnet20", (16, 20, 3)), ("vgg11-32", (32, 32, 3)), ("alexnet", (63, 67, 3))],
)
def test_float32_model_equals_pytorch(name, image) -> None:
    compare(models.build(name, image, 10, dropout=0.0), np.float32, 1e-4, samples=3)


def test_step_updates_like_sgd_with_momentum_and_decay_of_weights_only() -> None:
    spec = models.build("lenet5", (28, 28, 1), 10)
    model, twin = Model(spec, 3, np.float64), TorchTwin(spec, dtype="float64", momentum=0.9, weight_decay=0.01)
    twin.load(model.parameters)
    images, labels = batch(spec, 4, np.float64)
    velocity = {parameter.name: 0.0 for parameter in model.parameters.parameters}
    for lr in (0.1, 0.05):
        loss, _, _ = loss_and_gradients(model, images, labels, context(4))
        for parameter in model.parameters.parameters:
            decay = 0.01 * parameter.value if parameter.decay else 0.0
            velocity[parameter.name] = 0.9 * velocity[parameter.name] + parameter.grad + decay
            parameter.value[...] -= lr * velocity[parameter.name]
        assert twin.step(images, labels, lr) == pytest.approx(loss, rel=1e-12)
    for name, array in twin.parameters().items():
        np.testing.assert_allclose(model.parameters[name].value, array, rtol=1e-9, atol=1e-12)


def test_evaluation_uses_the_loaded_statistics() -> None:
    spec = models.build("resnet20", (8, 8, 3), 10)
    model, twin = Model(spec, 3, np.float64), TorchTwin(spec, dtype="float64")
    random = np.random.default_rng(0)
    for array in model.statistics.values():
        array[...] = random.uniform(0.5, 2, array.shape)
    twin.load(model.parameters, model.statistics)
    images, _ = batch(spec, 3, np.float64)
    assert worst(forward(model, images, context(3, training=False))[0], twin.forward(images)) < 1e-9
