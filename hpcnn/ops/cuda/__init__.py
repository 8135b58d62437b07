"""The CUDA implementation of every operator, on CuPy arrays of float32 or bfloat16; kernels are in `kernels/`."""

from hpcnn.ops.cuda.activation import activation_backward, activation_forward, add_forward
from hpcnn.ops.cuda.batchnorm import batchnorm_backward, batchnorm_forward, batchnorm_statistics
from hpcnn.ops.cuda.dropout import dropout_backward, dropout_forward
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
    "dropout_backward",
    "dropout_forward",
    "global_avgpool_backward",
    "global_avgpool_forward",
    "maxpool2d_backward",
    "maxpool2d_forward",
    "softmax_cross_entropy",
]
