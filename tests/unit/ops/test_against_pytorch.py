"""A second opinion, where PyTorch is installed: values and gradients of every operator agree with its own."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import ops
from tests.checks import assert_close

torch = pytest.importorskip("torch", reason="PyTorch is not installed; it serves as a second opinion only")
functional = torch.nn.functional
TOLERANCE = 1e-4


def tensor(array):
    """Return a torch tensor that wants a gradient; images become (N, C, H, W)."""
    array = np.moveaxis(array, -1, 1) if array.ndim == 4 else array
    return torch.from_numpy(np.ascontiguousarray(array)).requires_grad_()


def array(tensor):
    """Return an array of a torch tensor, images as (N, H, W, C)."""
    values = tensor.detach().numpy()
    return np.moveaxis(values, 1, -1) if values.ndim == 4 else values


def draw(random, *shapes):
    """Return float32 arrays of normal numbers."""
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("shape", "weight_shape", "geometry"),
    [
        ((4, 15, 17, 16), (24, 3, 3, 16), {"padding": 1}),
        ((4, 15, 17, 16), (24, 3, 3, 16), {"padding": 1, "stride": 2}),
        ((2, 33, 31, 3), (16, 7, 7, 3), {"padding": 3, "stride": 2}),
        ((2, 14, 14, 32), (8, 1, 1, 32), {}),
        ((2, 14, 14, 12), (8, 3, 3, 6), {"groups": 2, "padding": 2, "dilation": 2}),
    ],
)
def test_convolution_agrees(implementation, random, shape, weight_shape, geometry):
    x, weight, bias = draw(random, shape, weight_shape, (weight_shape[0],))
    theirs = [tensor(x), tensor(weight), tensor(bias)]
    expected = functional.relu(functional.conv2d(*theirs, **geometry))
    y = ops.conv2d_forward(x, weight, bias, activation="relu", **geometry)
    assert_close(array(expected), y, TOLERANCE)
    (grad,) = draw(random, y.shape)
    expected.backward(tensor(grad))
    error = ops.activation_backward(grad, y, "relu")
    grad_x = ops.conv2d_backward_input(error, weight, shape[1:3], **geometry)
    grad_weight, grad_bias = ops.conv2d_backward_weight(x, error, weight_shape[1:3], **geometry)
    for their, ours in zip(theirs, (grad_x, grad_weight, grad_bias), strict=True):
        assert_close(array(their.grad), ours, TOLERANCE)


def test_linear_layer_agrees(implementation, random):
    x, weight, bias, grad = draw(random, (16, 100), (40, 100), (40,), (16, 40))
    theirs = [tensor(x), tensor(weight), tensor(bias)]
    expected = functional.linear(*theirs)
    assert_close(array(expected), ops.linear_forward(x, weight, bias), TOLERANCE)
    expected.backward(tensor(grad))
    ours = ops.linear_backward_input(grad, weight), *ops.linear_backward_weight(x, grad)
    for their, our in zip(theirs, ours, strict=True):
        assert_close(array(their.grad), our, TOLERANCE)


@pytest.mark.parametrize("places", [{"stride": 2}, {"stride": 2, "padding": 1}, {"stride": 1}])
def test_pooling_agrees(implementation, random, places):
    (x,) = draw(random, (3, 14, 15, 8))
    their_x = tensor(x)
    expected = functional.max_pool2d(their_x, 3, **places)
    y, argmax = ops.maxpool2d_forward(x, 3, **places)
    assert_close(array(expected), y, TOLERANCE)
    (grad,) = draw(random, y.shape)
    expected.backward(tensor(grad))
    assert_close(array(their_x.grad), ops.maxpool2d_backward(grad, argmax, x.shape[1:3], 3, **places), TOLERANCE)

    their_x = tensor(x)
    expected = functional.avg_pool2d(their_x, 3, **places)
    assert_close(array(expected), ops.avgpool2d_forward(x, 3, **places), TOLERANCE)
    expected.backward(tensor(grad))
    assert_close(array(their_x.grad), ops.avgpool2d_backward(grad, x.shape[1:3], 3, **places), TOLERANCE)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_batch_normalisation_agrees(implementation, random, activation):
    x, gamma, beta, grad = draw(random, (4, 9, 7, 12), (12,), (12,), (4, 9, 7, 12))
    theirs = [tensor(x), tensor(gamma), tensor(beta)]
    expected = functional.batch_norm(theirs[0], None, None, theirs[1], theirs[2], training=True, eps=1e-3)
    slope = {None: 1.0, "relu": 0.0, "leaky_relu": ops.LEAKY_SLOPE}[activation]
    expected = functional.leaky_relu(expected, slope)
    y, mean, var, mask = ops.batchnorm_forward(x, gamma, beta, epsilon=1e-3, activation=activation)
    assert_close(array(expected), y, TOLERANCE)
    expected.backward(tensor(grad))
    gradients = ops.batchnorm_backward(grad, x, gamma, mean, var, mask, epsilon=1e-3, activation=activation)
    for their, our in zip(theirs, gradients, strict=True):
        assert_close(array(their.grad), our, TOLERANCE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_agrees(implementation, random, smoothing):
    (logits,), labels = draw(random, (32, 100)), random.integers(0, 100, 32)
    theirs = tensor(logits)
    expected = functional.cross_entropy(theirs, torch.from_numpy(labels), label_smoothing=smoothing)
    loss, _, grad = ops.softmax_cross_entropy(logits, labels, global_batch=32, label_smoothing=smoothing)
    assert expected.item() == pytest.approx(loss, rel=TOLERANCE)
    expected.backward()
    assert_close(array(theirs.grad), grad, TOLERANCE)
