"""The first 16 layers of YOLOv2, with a classifier behind them so that they train on labelled images.

References
----------
Redmon, Farhadi, "YOLO9000: better, faster, stronger", arXiv:1612.08242.
Rama, Threadgill, Gerstlauer, arXiv:2409.09083, split these layers into tiles because their feature maps outweigh their
3.42 M weights: 146 MB against 13.7 MB for one image of 608 x 608.
"""

from __future__ import annotations

from hpcnn.arrays import Shape
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.spec import ModelSpec

# (kernel, filters) of each convolution, None a 2 x 2 maximum pooling.
_LAYERS = (
    (3, 32), None, (3, 64), None, (3, 128), (1, 64), (3, 128), None,
    (3, 256), (1, 128), (3, 256), None, (3, 512), (1, 256), (3, 512), (1, 256),
)  # fmt: skip


def yolo16(input_shape: Shape, num_classes: int, dropout: float = 0.0, *, batchnorm: bool = True) -> ModelSpec:
    """Return the 16 layers with leaky ReLU, a mean over all positions, and a linear classifier.

    With `batchnorm` a convolution has no bias and a batch norm behind it, as in Darknet; without it a bias only.
    `dropout` > 0 adds a dropout layer before the classifier.
    """
    graph = GraphBuilder("yolo16", input_shape)
    convs = pools = 0
    for layer in _LAYERS:
        if layer is None:
            pools += 1
            graph.max_pool(f"pool{pools}", 2)
            continue
        convs += 1
        kernel_size, filters = layer
        padding = kernel_size // 2
        if batchnorm:
            graph.conv(f"conv{convs}", filters, kernel_size, padding=padding, bias=False)
            graph.batchnorm(f"norm{convs}", activation="leaky_relu")
        else:
            graph.conv(f"conv{convs}", filters, kernel_size, padding=padding, activation="leaky_relu")
    graph.global_average_pool(f"pool{pools + 1}")
    graph.dropout("drop", dropout)
    graph.linear("fc", num_classes)
    return graph.finish(num_classes)
