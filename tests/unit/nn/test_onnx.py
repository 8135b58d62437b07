"""ONNX graphs run by another program, onnxruntime, against the layers they are made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hpcnn.data.augment import normalise
from hpcnn.errors import ShapeError
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.nn.onnx import to_onnx
from hpcnn.spec import BatchNormSpec, ConvSpec, LayerSpec, ModelSpec, PartialSumSpec
from tests.checks import assert_close
from tests.serial import context, forward

onnx = pytest.importorskip("onnx", reason="onnx is not installed; pip install 'hpcnn[test]'")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'hpcnn[test]'")

TOLERANCE = 1e-4


def trained(spec: ModelSpec) -> Model:
    """Return a model all of whose numbers matter: biases and statistics that are not zero, scales that are not one."""
    model, draw = Model(spec, seed=3), np.random.default_rng(3)
    for name, array in [(one.name, one.value) for one in model.parameters.parameters] + [*model.statistics.items()]:
        if name.endswith(("gamma", "running_var")):
            array[...] = draw.uniform(0.5, 1.5, array.shape)
        elif not name.endswith("weight"):
            array[...] = draw.normal(0, 0.1, array.shape)
    return model


def exported(model: Model, mean: np.ndarray, std: np.ndarray, **options: object) -> onnx.ModelProto:
    tensors = {one.name: one.value for one in model.parameters.parameters} | model.statistics
    return to_onnx(model.spec, tensors, mean=mean, std=std, **options)


def run(graph: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images})
    return logits


def assert_same(spec: ModelSpec, count: int = 3) -> None:
    """Compare logits on images of all bytes, normalised unlike in any other channel."""
    model, draw = trained(spec), np.random.default_rng(4)
    channels = spec.input_shape[2]
    mean, std = draw.uniform(0.3, 0.6, channels), draw.uniform(0.1, 0.3, channels)
    images = draw.integers(0, 256, (count, *spec.input_shape), np.uint8)
    expected, _ = forward(model, normalise(images, mean, std), context(count, training=False))
    graph = exported(model, mean, std)
    onnx.checker.check_model(graph, full_check=True)
    logits = run(graph, images)
    assert (logits.dtype, logits.shape) == (np.float32, (count, spec.num_classes))
    assert_close(expected, logits, TOLERANCE)
    assert expected.argmax(axis=1).tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("lenet5", (28, 26, 1), {"dropout": 0.5}),
        ("alexnet", (63, 71, 3), {}),
        ("vgg16-32", (32, 32, 3), {}),
        ("resnet20", (33, 29, 3), {"dropout": 0.2}),
        ("resnet50", (65, 50, 3), {}),
        ("yolo16", (48, 40, 3), {}),
        ("yolo16", (32, 48, 3), {"batchnorm": False}),
    ],
)
def test_a_model_gives_the_logits_of_its_layers(name: str, image: tuple[int, ...], options: dict) -> None:
    assert_same(models.build(name, image, 7, **options))


def test_every_model_is_compared() -> None:
    marks = [mark for mark in test_a_model_gives_the_logits_of_its_layers.pytestmark if mark.name == "parametrize"]
    compared = {case[0] for case in marks[0].args[1]}
    # The others have the same kinds of layers, in other numbers: VGG's classifier is AlexNet's, and takes seconds.
    assert set(models.names()) == compared | {"vgg11", "vgg16", "vgg11-32"}


def test_what_no_model_has_yet_is_right_as_well() -> None:
    """Padding that differs on all sides, dilation, groups, means over padding, leaky sums, norms of features."""
    graph = GraphBuilder("odd", (13, 11, 4))
    graph.conv("conv1", 8, (3, 4), stride=(2, 1), padding=((2, 0), (1, 3)), activation="leaky_relu")
    graph._append(
        ConvSpec,
        "conv2",
        None,
        out_channels=6,
        kernel_size=(3, 2),
        padding=((1, 2), (0, 1)),
        dilation=(1, 2),
        groups=2,
        bias=False,
    )
    source = graph.last
    graph._pool("average", "pool1", 3, 1, 1)
    graph.add("add", source, activation="leaky_relu")
    graph._pool("max", "pool2", 3, 2, 1)
    graph.shortcut("shortcut", 9, stride=(2, 1))
    graph.linear("fc1", 5)
    graph._append(BatchNormSpec, "norm", None, epsilon=0.3, activation="relu")
    graph.linear("fc2", 3)
    assert_same(graph.finish(3), count=5)


def test_one_file_takes_any_number_of_images() -> None:
    model = trained(models.build("lenet5", (28, 28, 1), 10))
    graph = exported(model, np.full(1, 0.5), np.full(1, 0.25))
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    assert_close(run(graph, images)[2:3], run(graph, images[2:3]), TOLERANCE)


def test_the_file_says_what_it_is() -> None:
    model = trained(models.build("lenet5", (28, 28, 1), 2))
    graph = exported(model, np.zeros(1), np.ones(1), class_names=("a, b", "ä"), metadata={"step": "7"})
    found = {entry.key: entry.value for entry in graph.metadata_props}
    assert (["a, b", "ä"], "7") == (json.loads(found["class_names"]), found["step"])
    assert (17, 8, "hpcnn") == (graph.opset_import[0].version, graph.ir_version, graph.producer_name)
    (images,), (logits,) = graph.graph.input, graph.graph.output
    assert ("images", onnx.TensorProto.UINT8) == (images.name, images.type.tensor_type.elem_type)
    shape = [one.dim_param or one.dim_value for one in images.type.tensor_type.shape.dim]
    assert (["N", 28, 28, 1], "logits") == (shape, logits.name)
    assert {"conv1", "pool1", "fc3"} <= {node.name for node in graph.graph.node}


def test_a_layer_that_has_no_place_in_onnx_is_named() -> None:
    product = ConvSpec(name="cut", inputs=("input",), input_shape=(4, 4, 1), out_channels=1, kernel_size=(1, 1))
    layer: LayerSpec = PartialSumSpec(
        name="cut",
        inputs=("input",),
        input_shape=(4, 4, 1),
        product=product,
        num_completed=1,
        bias=False,
        activation=None,
    )
    spec = ModelSpec(name="part", input_shape=(4, 4, 1), num_classes=1, layers=(layer,))
    with pytest.raises(ShapeError, match="layer 'cut' is a PartialSumSpec"):
        to_onnx(spec, {}, mean=np.zeros(1), std=np.ones(1))
