"""The plain NumPy implementation of every operator, for float32 and float64, and by way of float32 for bfloat16.

Arguments arrive checked and in full: C-ordered arrays, pairs, four-sided padding. Results are on pooled pages
(`hpcnn.arrays.empty`), and temporaries are small enough to stay in cache.
"""

from hpcnn.ops.cpu import activation, batchnorm, conv2d, dropout, linear, loss, pool2d
from hpcnn.ops.cpu.batchnorm import batchnorm_track
from hpcnn.ops.cpu.widened import through_float32

activation_forward = through_float32(activation.activation_forward)
add_forward = through_float32(activation.add_forward)
activation_backward = through_float32(activation.activation_backward)
batchnorm_forward = through_float32(batchnorm.batchnorm_forward)
batchnorm_backward = through_float32(batchnorm.batchnorm_backward)
batchnorm_statistics = through_float32(batchnorm.batchnorm_statistics, rounded=None)
conv2d_forward = through_float32(conv2d.conv2d_forward)
conv2d_backward_input = through_float32(conv2d.conv2d_backward_input)
conv2d_backward_weight = through_float32(conv2d.conv2d_backward_weight, rounded=None)
dropout_forward = through_float32(dropout.dropout_forward)
dropout_backward = through_float32(dropout.dropout_backward)
linear_forward = through_float32(linear.linear_forward)
linear_backward_input = through_float32(linear.linear_backward_input)
linear_backward_weight = through_float32(linear.linear_backward_weight, rounded=None)
softmax_cross_entropy = through_float32(loss.softmax_cross_entropy, rounded=2)
avgpool2d_forward = through_float32(pool2d.avgpool2d_forward)
global_avgpool_forward = through_float32(pool2d.global_avgpool_forward)
maxpool2d_forward = through_float32(pool2d.maxpool2d_forward)
avgpool2d_backward = through_float32(pool2d.avgpool2d_backward)
global_avgpool_backward = through_float32(pool2d.global_avgpool_backward)
maxpool2d_backward = through_float32(pool2d.maxpool2d_backward)

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
