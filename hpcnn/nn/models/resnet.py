"""Residual networks: ResNet-20 for small images and ResNet-50 for large ones.

References
----------
He, Zhang, Ren, Sun, "Deep residual learning for image recognition", arXiv:1512.03385.
ResNet-20 has shortcuts without parameters (option A): 269,722 parameters for 10 classes. ResNet-50 is the form known as
v1.5, which strides in the 3 x 3 convolution of a block: 25,557,032 for 1000 classes.
"""

from __future__ import annotations

from hpcnn.arrays import Shape
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.spec import ModelSpec


def resnet20(input_shape: Shape, num_classes: int, dropout: float = 0.0) -> ModelSpec:
    """Return ResNet-20: a first convolution, nine basic blocks of 16, 32 and 64 filters, and the classifier.

    `dropout` > 0 adds a dropout layer before the classifier.
    """
    graph = GraphBuilder("resnet20", input_shape)
    _conv_norm(graph, "conv1", "norm1", 16, 3)
    for stage, filters in enumerate((16, 32, 64), start=1):
        for place in range(1, 4):
            basic_block(graph, f"block{stage}_{place}", filters, stride=2 if stage > 1 and place == 1 else 1)
    graph.global_average_pool("pool")
    graph.dropout("drop", dropout)
    graph.linear("fc", num_classes)
    return graph.finish(num_classes)


def resnet50(input_shape: Shape, num_classes: int, dropout: float = 0.0) -> ModelSpec:
    """Return ResNet-50 v1.5: a first convolution and pooling, 16 bottleneck blocks, and the classifier.

    `dropout` > 0 adds a dropout layer before the classifier.
    """
    graph = GraphBuilder("resnet50", input_shape)
    _conv_norm(graph, "conv1", "norm1", 64, 7, stride=2)
    graph.max_pool("pool1", 3, stride=2, padding=1)
    for stage, (num_blocks, filters) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for place in range(1, num_blocks + 1):
            bottleneck(graph, f"block{stage}_{place}", filters, stride=2 if stage > 1 and place == 1 else 1)
    graph.global_average_pool("pool2")
    graph.dropout("drop", dropout)
    graph.linear("fc", num_classes)
    return graph.finish(num_classes)


def basic_block(graph: GraphBuilder, name: str, filters: int, stride: int) -> None:
    """Add two 3 x 3 convolutions beside a shortcut that subsamples and pads with zero channels."""
    source = shortcut = graph.last
    if stride != 1 or graph.shape()[2] != filters:
        shortcut = graph.shortcut(f"{name}_shortcut", filters, stride=stride)
    _conv_norm(graph, f"{name}_conv1", f"{name}_norm1", filters, 3, stride=stride, source=source)
    _conv_norm(graph, f"{name}_conv2", f"{name}_norm2", filters, 3, relu=False)
    graph.add(f"{name}_add", shortcut, activation="relu")


def bottleneck(graph: GraphBuilder, name: str, filters: int, stride: int) -> None:
    """Add 1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut that a 1 x 1 convolution widens where it must."""
    source = shortcut = graph.last
    wide = 4 * filters
    if stride != 1 or graph.shape()[2] != wide:
        shortcut = _conv_norm(graph, f"{name}_conv0", f"{name}_norm0", wide, 1, stride=stride, relu=False)
    _conv_norm(graph, f"{name}_conv1", f"{name}_norm1", filters, 1, source=source)
    _conv_norm(graph, f"{name}_conv2", f"{name}_norm2", filters, 3, stride=stride)
    _conv_norm(graph, f"{name}_conv3", f"{name}_norm3", wide, 1, relu=False)
    graph.add(f"{name}_add", shortcut, activation="relu")


def _conv_norm(
    graph: GraphBuilder,
    conv: str,
    norm: str,
    filters: int,
    kernel_size: int,
    *,
    stride: int = 1,
    relu: bool = True,
    source: str | None = None,
) -> str:
    """Add a convolution without bias, padded to keep the size, and its batch norm; return the latter's name."""
    padding = kernel_size // 2
    graph.conv(conv, filters, kernel_size, stride=stride, padding=padding, bias=False, source=source)
    return graph.batchnorm(norm, activation="relu" if relu else None)
