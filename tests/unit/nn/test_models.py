"""Architectures against published numbers."""

from __future__ import annotations

from math import prod

import pytest

from hpcnn.config import ModelConfig
from hpcnn.errors import ConfigError, ShapeError
from hpcnn.nn import models
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.nn.models.yolo import yolo16
from hpcnn.spec import BatchNormSpec, ConvSpec, DropoutSpec, PoolSpec


def layer(model, name):
    return next(layer for layer in model.layers if layer.name == name)


@pytest.mark.parametrize(
    ("name", "image", "classes", "expected"),
    [
        ("lenet5", (28, 28, 1), 10, 61_706),
        ("alexnet", (224, 224, 3), 1000, 61_100_840),
        ("alexnet", (227, 227, 3), 1000, 61_100_840),
        ("vgg11", (224, 224, 3), 1000, 132_863_336),
        ("vgg16", (224, 224, 3), 1000, 138_357_544),
        ("vgg11-32", (32, 32, 3), 10, 9_225_610),
        ("vgg16-32", (32, 32, 3), 10, 14_719_818),
        ("resnet20", (32, 32, 3), 10, 269_722),
        ("resnet50", (224, 224, 3), 1000, 25_557_032),
    ],
)
def test_number_of_parameters_is_the_published_one(name, image, classes, expected) -> None:
    assert expected == models.build(name, image, classes).num_parameters


@pytest.mark.parametrize("batchnorm", [True, False])
def test_yolo_convolutions_have_the_kernels_filters_and_weights_of_the_paper(batchnorm) -> None:
    model = yolo16((608, 608, 3), 20, batchnorm=batchnorm)
    stack = [spec for spec in model.layers if isinstance(spec, ConvSpec | PoolSpec)]
    assert "".join("C" if isinstance(spec, ConvSpec) else "P" for spec in stack) == "CPCPCCCPCCCPCCCC"
    kernels = [spec.kernel_size[0] if isinstance(spec, ConvSpec) else spec.window[0] for spec in stack]
    assert kernels == [3, 2, 3, 2, 3, 1, 3, 2, 3, 1, 3, 2, 3, 1, 3, 1]
    convs = [spec for spec in stack if isinstance(spec, ConvSpec)]
    assert [spec.out_channels for spec in convs] == [32, 64, 128, 64, 128, 256, 128, 256, 512, 256, 512, 256]
    assert sum(prod(spec.parameters["weight"]) for spec in convs) == 3_418_976
    assert convs[-1].output_shape == (38, 38, 256)
    norms = [spec for spec in model.layers if isinstance(spec, BatchNormSpec)]
    assert len(convs) * batchnorm == len(norms)
    assert all(spec.bias != batchnorm for spec in convs)
    assert {"leaky_relu"} == {spec.activation for spec in (norms if batchnorm else convs)}


@pytest.mark.parametrize(
    ("name", "image", "gflops"),
    [
        ("alexnet", (224, 224, 3), 2 * 0.7142),  # multiply-adds as counted by torchvision: 0.714 G
        ("vgg16", (224, 224, 3), 2 * 15.470),
        ("resnet50", (224, 224, 3), 2 * 4.089),
    ],
)
def test_forward_work_is_the_published_one(name, image, gflops) -> None:
    assert gflops == pytest.approx(models.build(name, image, 1000).forward_flops / 1e9, rel=1e-3)


def test_feature_maps_of_resnet50_shrink_as_published() -> None:
    model = models.build("resnet50", (224, 224, 3), 1000)
    expected = {
        "conv1": (112, 112, 64),
        "pool1": (56, 56, 64),
        "block1_3_add": (56, 56, 256),
        "block2_4_add": (28, 28, 512),
        "block3_6_add": (14, 14, 1024),
        "block4_3_add": (7, 7, 2048),
        "pool2": (2048,),
        "fc": (1000,),
    }
    assert expected == {name: layer(model, name).output_shape for name in expected}


def test_resnet50_strides_in_its_3x3_convolutions() -> None:
    model = models.build("resnet50", (224, 224, 3), 1000)
    assert layer(model, "block2_1_conv1").stride == (1, 1)
    assert layer(model, "block2_1_conv2").stride == (2, 2)
    assert ("block1_3_add",) == layer(model, "block2_1_conv1").inputs == layer(model, "block2_1_conv0").inputs


def test_resnet20_shortcuts_carry_no_parameters() -> None:
    model = models.build("resnet20", (32, 32, 3), 10)
    assert layer(model, "block2_1_add").inputs == ("block2_1_norm2", "block2_1_shortcut")
    assert ("block1_3_add",) == layer(model, "block2_1_conv1").inputs == layer(model, "block2_1_shortcut").inputs
    assert layer(model, "block2_1_shortcut").output_shape == (16, 16, 32)
    assert layer(model, "block2_2_add").inputs == ("block2_2_norm2", "block2_1_add")
    assert layer(model, "block2_1_shortcut").num_parameters == 0


def test_lenet_has_the_maps_of_the_paper() -> None:
    model = models.build("lenet5", (28, 28, 1), 10)
    shapes = [spec.output_shape for spec in model.layers]
    assert shapes == [(28, 28, 6), (14, 14, 6), (10, 10, 16), (5, 5, 16), (400,), (120,), (84,), (10,)]


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("image", [(64, 96, 1), (75, 67, 3), (224, 224, 3)])
def test_every_model_takes_other_images_and_classes(name, image) -> None:
    model = models.build(name, image, 7)
    assert model.layers[-1].output_shape == (7,)
    assert (image, 7, name) == (model.input_shape, model.num_classes, model.name)
    assert not any("/" in spec.name for spec in model.layers)  # names become paths in files


def test_too_small_an_image_is_refused_with_the_layer_that_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"alexnet: layer 'pool5' does not fit.*images of \(32, 32, 3\)"):
        models.build("alexnet", (32, 32, 3), 10)
    with pytest.raises(ShapeError, match=r"lenet5: input_shape \(=\(28, 28\)\)"):
        models.build("lenet5", (28, 28), 10)


def test_unknown_model_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown name 'resnet51'\. Did you mean 'resnet50'"):
        models.build("resnet51", (32, 32, 3), 10)
    with pytest.raises(ConfigError, match="Models are: lenet5, alexnet"):
        models.build("transformer", (32, 32, 3), 10)


def test_only_yolo_can_be_configured_without_batch_norm() -> None:
    for name in models.names():
        config = ModelConfig(name=name, batchnorm=False, dropout=0.25)
        if name == "yolo16":
            expected = yolo16((64, 96, 3), 7, 0.25, batchnorm=False)
            assert expected == models.configured(config, (64, 96, 3), 7)
            assert expected != models.configured(ModelConfig(name=name, dropout=0.25), (64, 96, 3), 7)
            continue
        with pytest.raises(ConfigError, match=rf"'{name}' has no other form .*batchnorm \(=false\).* of yolo16 there"):
            models.configured(config, (64, 96, 3), 7)
        plain = models.configured(ModelConfig(name=name), (64, 96, 3), 7)
        assert models.build(name, (64, 96, 3), 7) == plain


def test_no_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_classes \(=0\)"):
        models.build("lenet5", (28, 28, 1), 0)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("alexnet", None, [0.5, 0.5]),
        ("alexnet", 0.0, []),
        ("vgg11", 0.25, [0.25, 0.25]),
        ("vgg16-32", None, []),
        ("vgg16-32", 0.3, [0.3]),
        ("resnet20", 0.0, []),
    ],
)
def test_dropout_rate_is_the_published_or_the_given_one(name, given, expected) -> None:
    model = models.build(name, (64, 64, 3), 10, dropout=given)
    assert expected == [spec.rate for spec in model.layers if isinstance(spec, DropoutSpec)]


@pytest.mark.parametrize("name", models.names())
def test_every_model_takes_a_dropout_rate_and_loses_no_parameters_by_it(name) -> None:
    without, with_rate = (models.build(name, (64, 64, 3), 10, dropout=rate) for rate in (0.0, 0.3))
    assert {spec.rate for spec in with_rate.layers if isinstance(spec, DropoutSpec)} == {0.3}
    assert not any(isinstance(spec, DropoutSpec) for spec in without.layers)
    assert with_rate.num_parameters == without.num_parameters
    assert [spec.name for spec in without.layers if spec.parameters] == [
        spec.name for spec in with_rate.layers if spec.parameters
    ]


def test_builder_threads_shapes_and_names() -> None:
    graph = GraphBuilder("net", (9, 7, 2))
    first = graph.conv("conv", 4, (3, 1), stride=(2, 1), padding=((1, 0), (0, 0)))
    assert graph.shape() == (4, 7, 4)
    graph.average_pool("pool", 3, stride=1, padding=1)
    graph.add("add", first, activation="relu")
    graph.linear("fc", 5)
    model = graph.finish(5)
    assert [spec.name for spec in model.layers] == ["conv", "pool", "add", "flatten_fc", "fc"]
    assert model.layers[-1].input_shape == (112,)


def test_two_layers_of_one_name_are_refused() -> None:
    graph = GraphBuilder("net", (8, 8, 2))
    graph.conv("conv", 2, 1)
    graph.conv("conv", 2, 1)
    with pytest.raises(ShapeError, match="two layers are named 'conv'"):
        graph.finish(2)
