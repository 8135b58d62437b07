"""VGG-11 (A) and VGG-16 (D): the ImageNet form, and the well-known short form for 32 x 32 images.

References
----------
Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition", arXiv:1409.1556.
Parameters, 224 x 224 and 1000 classes: 132,863,336 and 138,357,544; 32 x 32 and 10 classes: 9,225,610 and 14,719,818.
"""

from __future__ import annotations

from hpcnn.arrays import Shape
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.spec import ModelSpec

# Filters of the 3 x 3 convolutions; each group ends in a 2 x 2 maximum pooling.
_BODIES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


def vgg(depth: int, input_shape: Shape, num_classes: int, dropout: float = 0.5) -> ModelSpec:
    """Return VGG-11 or VGG-16 with two hidden layers of 4096, each followed by dropout."""
    graph = _body(f"vgg{depth}", depth, input_shape)
    for name, drop in (("fc1", "drop1"), ("fc2", "drop2")):
        graph.linear(name, 4096, activation="relu")
        graph.dropout(drop, dropout)
    graph.linear("fc3", num_classes)
    return graph.finish(num_classes)


def vgg_32(depth: int, input_shape: Shape, num_classes: int, dropout: float = 0.0) -> ModelSpec:
    """Return the same body with one fully connected layer, behind a dropout where its rate is not 0."""
    graph = _body(f"vgg{depth}-32", depth, input_shape)
    graph.flatten("flatten")
    graph.dropout("drop", dropout)
    graph.linear("fc1", num_classes)
    return graph.finish(num_classes)


def _body(name: str, depth: int, input_shape: Shape) -> GraphBuilder:
    """Return a builder that holds the convolutions and poolings, named conv<group>_<place>."""
    graph = GraphBuilder(name, input_shape)
    for group, filters in enumerate(_BODIES[depth], start=1):
        for place, out_channels in enumerate(filters, start=1):
            graph.conv(f"conv{group}_{place}", out_channels, 3, padding=1, activation="relu")
        graph.max_pool(f"pool{group}", 2)
    return graph
