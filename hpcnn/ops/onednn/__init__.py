"""The oneDNN implementation of the operators, for float32 on CPUs; the C library is called through ctypes.

`pip install 'hpcnn[onednn]'` brings the library, a system's own libdnnl.so.3 serves as well, HPCNN_ONEDNN=path names
another. What it has no fast code for is done by `hpcnn.ops.cpu`: always for the functions re-exported here from there,
and shape by shape, recorded in `fallbacks()`, for the others.
"""

from hpcnn.ops.cpu import dropout_backward, dropout_forward, softmax_cross_entropy
from hpcnn.ops.cpu.batchnorm import batchnorm_track
from hpcnn.ops.onednn.batchnorm import batchnorm_backward, batchnorm_forward, batchnorm_statistics
from hpcnn.ops.onednn.conv2d import conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from hpcnn.ops.onednn.library import available, describe
from hpcnn.ops.onednn.linear import linear_backward_input, linear_backward_weight, linear_forward
from hpcnn.ops.onednn.pointwise import activation_backward, activation_forward, add_forward
from hpcnn.ops.onednn.pool2d import (
    avgpool2d_backward,
    avgpool2d_forward,
    global_avgpool_backward,
    global_avgpool_forward,
    maxpool2d_backward,
    maxpool2d_forward,
)
from hpcnn.ops.onednn.primitive import fallbacks

__all__ = [
    "activation_backward",
    "activation_forward",
    "add_forward",
    "available",
    "avgpool2d_backward",
    "avgpool2d_forward",
    "batchnorm_backward",
    "batchnorm_forward",
    "batchnorm_statistics",
    "batchnorm_track",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "conv2d_forward",
    "describe",
    "dropout_backward",
    "dropout_forward",
    "fallbacks",
    "global_avgpool_backward",
    "global_avgpool_forward",
    "linear_backward_input",
    "linear_backward_weight",
    "linear_forward",
    "maxpool2d_backward",
    "maxpool2d_forward",
    "softmax_cross_entropy",
]
