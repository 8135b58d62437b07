"""The oneDNN implementation of the operators, for float32 and bfloat16 on CPUs; the C library is called through ctypes.

`pip install 'hpcnn[onednn]'` brings the library, a system's own libdnnl.so.3 serves as well, HPCNN_ONEDNN=path names
another. What it has no fast code for is done by `hpcnn.ops.cpu`: always for the functions re-exported here from there,
and shape by shape, recorded in `fallbacks()`, for the others.

bfloat16 goes by way of float32 on processors without instructions for it, which the library imitates at a third of the
speed of float32; and where the library is slow, rounds sums on the way, or errs (see the conditions `unless`).
"""

from hpcnn.ops.cpu import dropout_backward, dropout_forward, softmax_cross_entropy
from hpcnn.ops.cpu.batchnorm import batchnorm_track
from hpcnn.ops.cpu.widened import through_float32
from hpcnn.ops.onednn import batchnorm, conv2d, linear, pointwise, pool2d
from hpcnn.ops.onednn.library import available, describe
from hpcnn.ops.onednn.library import computes_bfloat16 as native
from hpcnn.ops.onednn.primitive import fallbacks

activation_forward = through_float32(pointwise.activation_forward, unless=native)
add_forward = through_float32(pointwise.add_forward, unless=native)
activation_backward = through_float32(pointwise.activation_backward, unless=native)
batchnorm_forward = through_float32(batchnorm.batchnorm_forward, unless=native)
batchnorm_backward = through_float32(batchnorm.batchnorm_backward, unless=native)
batchnorm_statistics = through_float32(batchnorm.batchnorm_statistics, rounded=None, unless=native)
conv2d_forward = through_float32(conv2d.conv2d_forward, unless=native)
conv2d_backward_input = through_float32(conv2d.conv2d_backward_input, unless=native)
conv2d_backward_weight = through_float32(
    conv2d.conv2d_backward_weight, rounded=None, unless=conv2d.weight_gradient_is_right
)
linear_forward = through_float32(linear.linear_forward, unless=linear.pays_rounded)
linear_backward_input = through_float32(linear.linear_backward_input, unless=linear.pays_rounded)
linear_backward_weight = through_float32(linear.linear_backward_weight, rounded=None, unless=linear.pays_rounded)
avgpool2d_forward = through_float32(pool2d.avgpool2d_forward, unless=native)
global_avgpool_forward = through_float32(pool2d.global_avgpool_forward, unless=native)
maxpool2d_forward = through_float32(pool2d.maxpool2d_forward, unless=pool2d.places_fit)
avgpool2d_backward = through_float32(pool2d.avgpool2d_backward, unless=pool2d.adds_nothing_up)
global_avgpool_backward = through_float32(pool2d.global_avgpool_backward, unless=native)
maxpool2d_backward = through_float32(pool2d.maxpool2d_backward, unless=pool2d.adds_nothing_up)

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
