"""AlexNet in its single-tower form.

References
----------
Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997.
61,100,840 parameters for 1000 classes and images of 224 x 224 or 227 x 227.
"""

from __future__ import annotations

from hpcnn.arrays import Shape
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.spec import ModelSpec


def alexnet(input_shape: Shape, num_classes: int, dropout: float = 0.5) -> ModelSpec:
    """Return AlexNet, with dropout before the first two fully connected layers."""
    graph = GraphBuilder("alexnet", input_shape)
    graph.conv("conv1", 64, 11, stride=4, padding=2, activation="relu")
    graph.max_pool("pool1", 3, stride=2)
    graph.conv("conv2", 192, 5, padding=2, activation="relu")
    graph.max_pool("pool2", 3, stride=2)
    graph.conv("conv3", 384, 3, padding=1, activation="relu")
    graph.conv("conv4", 256, 3, padding=1, activation="relu")
    graph.conv("conv5", 256, 3, padding=1, activation="relu")
    graph.max_pool("pool5", 3, stride=2)
    graph.flatten("flatten")
    graph.dropout("drop1", dropout)
    graph.linear("fc1", 4096, activation="relu")
    graph.dropout("drop2", dropout)
    graph.linear("fc2", 4096, activation="relu")
    graph.linear("fc3", num_classes)
    return graph.finish(num_classes)
