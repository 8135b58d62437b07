"""The CUDA implementation of every operator, on CuPy arrays of float32 or bfloat16; kernels are in `kernels/`.

Arguments arrive checked and in full, as they do for `hpcnn.ops.cpu`. Parameters and their gradients are float32,
activations and their gradients either type; sums are float32 or wider, in an order that is always the same.
"""

from hpcnn.ops.cuda.activation import activation_backward, activation_forward, add_forward
from hpcnn.ops.cuda.batchnorm import batchnorm_backward, batchnorm_forward, batchnorm_statistics, batchnorm_track
from hpcnn.ops.cuda.conv2d import conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from hpcnn.ops.cuda.dropout import dropout_backward, dropout_forward
from hpcnn.ops.cuda.linear import linear_backward_input, linear_backward_weight, linear_forward
from hpcnn.ops.cuda.loss import softmax_cross_entropy
from hpcnn.ops.cuda.pool2d import (
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
