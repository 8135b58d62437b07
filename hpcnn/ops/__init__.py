"""Array functions in forward and backward pairs. They know arrays and have never heard of ranks.

Images are (N, H, W, C), filters (K, R, S, C / groups), fully connected weights (out, in). Each function checks its
arguments and hands them to the implementation that serves its arrays (see `hpcnn.ops.backend`). No function changes
its inputs; `out=` arrays are overwritten.
"""

from hpcnn.ops.activation import LEAKY_SLOPE, activation_backward, activation_forward, add_forward
from hpcnn.ops.batchnorm import batchnorm_backward, batchnorm_forward, batchnorm_statistics, batchnorm_track
from hpcnn.ops.cast import cast
from hpcnn.ops.conv2d import conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from hpcnn.ops.dropout import dropout_backward, dropout_forward
from hpcnn.ops.linear import linear_backward_input, linear_backward_weight, linear_forward
from hpcnn.ops.loss import softmax_cross_entropy
from hpcnn.ops.pool2d import (
    avgpool2d_backward,
    avgpool2d_forward,
    global_avgpool_backward,
    global_avgpool_forward,
    maxpool2d_backward,
    maxpool2d_forward,
)
from hpcnn.ops.update import adam_update, lars_rate, lars_update, sgd_update, squared_norm, squared_norms

__all__ = [
    "LEAKY_SLOPE",
    "activation_backward",
    "activation_forward",
    "adam_update",
    "add_forward",
    "avgpool2d_backward",
    "avgpool2d_forward",
    "batchnorm_backward",
    "batchnorm_forward",
    "batchnorm_statistics",
    "batchnorm_track",
    "cast",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "conv2d_forward",
    "dropout_backward",
    "dropout_forward",
    "global_avgpool_backward",
    "global_avgpool_forward",
    "lars_rate",
    "lars_update",
    "linear_backward_input",
    "linear_backward_weight",
    "linear_forward",
    "maxpool2d_backward",
    "maxpool2d_forward",
    "sgd_update",
    "softmax_cross_entropy",
    "squared_norm",
    "squared_norms",
]
