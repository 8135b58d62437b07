"""The plain NumPy implementation of every operator, for float32 and float64.

Arguments arrive checked and in full: C-ordered arrays, pairs, four-sided padding. Results are on pooled pages
(`hpcnn.arrays.empty`), and temporaries are small enough to stay in cache.
"""

from hpcnn.ops.cpu.activation import activation_backward, activation_forward, add_forward
from hpcnn.ops.cpu.batchnorm import batchnorm_backward, batchnorm_forward, batchnorm_statistics, batchnorm_track
from hpcnn.ops.cpu.conv2d import conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from hpcnn.ops.cpu.dropout import dropout_backward, dropout_forward
from hpcnn.ops.cpu.linear import linear_backward_input, linear_backward_weight, linear_forward
from hpcnn.ops.cpu.loss import softmax_cross_entropy
from hpcnn.ops.cpu.pool2d import (
    avgpool2d_backward,
    avgpool2d_forward,
    global_avgpool_backward,
    global_avgpool_forward,
    maxpool2d_backward,
    maxpool2d_forward,
)

__all__ = [
    "activation_backward",
    "activation_forward",
    "add_forward",
    "avgpool2d_backward",
    "avgpool2d_forward",
    "batchnorm_backward",
    "batchnorm_forward",
    "batchnorm_statistics",
    "batchnorm_track",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "conv2d_forward",
    "dropout_backward",
    "dropout_forward",
    "global_avgpool_backward",
    "global_avgpool_forward",
    "linear_backward_input",
    "linear_backward_weight",
    "linear_forward",
    "maxpool2d_backward",
    "maxpool2d_forward",
    "softmax_cross_entropy",
]
