"""LeNet-5 for small grey or colour images.

References
----------
LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 86 (1998).
The form in use today: all maps connected, maximum pooling, ReLU, softmax; 61,706 parameters for 28 x 28 x 1.
"""

from __future__ import annotations

from hpcnn.arrays import Shape
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.spec import ModelSpec


def lenet5(input_shape: Shape, num_classes: int, dropout: float = 0.0) -> ModelSpec:
    """Return LeNet-5; its weights start as Glorot's. `dropout` > 0 adds a dropout layer behind either hidden layer."""
    graph = GraphBuilder("lenet5", input_shape)
    graph.conv("conv1", 6, 5, padding=2, activation="relu")
    graph.max_pool("pool1", 2)
    graph.conv("conv2", 16, 5, activation="relu")
    graph.max_pool("pool2", 2)
    graph.linear("fc1", 120, activation="relu")
    graph.dropout("drop1", dropout)
    graph.linear("fc2", 84, activation="relu")
    graph.dropout("drop2", dropout)
    graph.linear("fc3", num_classes)
    return graph.finish(num_classes, initial_weights="glorot")
