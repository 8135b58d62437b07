"""PyTorch's operations on our arrays, ready to be timed: each function prepares one and returns it as a closure.

Tensors are views of our arrays: (N, H, W, C) under PyTorch's axis names is channels-last. Where an operation of ours
has an activation fused, PyTorch's is followed by its in-place activation, as a model in it would do. Padding must be
even on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from hpcnn.arrays import Pair
from hpcnn.ops import LEAKY_SLOPE
from hpcnn.spec import BatchNormSpec, ConvSpec, LinearSpec, PoolSpec

Call: TypeAlias = Callable[[], Any]


def conv2d(spec: ConvSpec, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> Call:
    """Return a convolution with its bias and activation."""
    import torch

    image, filters, offset = _tensor(x), _tensor(weight), None if bias is None else _tensor(bias)
    geometry = (spec.stride, _even(spec), spec.dilation, spec.groups)
    return lambda: _activate(torch.conv2d(image, filters, offset, *geometry), spec.activation)


def conv2d_gradients(
    spec: ConvSpec, x: np.ndarray, weight: np.ndarray, grad_output: np.ndarray, wanted: tuple[bool, bool, bool]
) -> Call:
    """Return a convolution's backward pass for some of (input, weight, bias)."""
    import torch

    image, filters, grad = _tensor(x), _tensor(weight), _tensor(grad_output)
    arguments = ([spec.out_channels], spec.stride, _even(spec), spec.dilation, False, [0, 0], spec.groups, wanted)
    return lambda: torch.ops.aten.convolution_backward(grad, image, filters, *arguments)


def linear(spec: LinearSpec, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> Call:
    """Return a fully connected layer with its bias and activation."""
    import torch

    samples, matrix, offset = _tensor(x), _tensor(weight), None if bias is None else _tensor(bias)
    return lambda: _activate(torch.nn.functional.linear(samples, matrix, offset), spec.activation)


def linear_input_gradient(weight: np.ndarray, grad_output: np.ndarray) -> Call:
    """Return a fully connected layer's input gradient."""
    matrix, grad = _tensor(weight), _tensor(grad_output)
    return lambda: grad @ matrix


def linear_weight_gradient(x: np.ndarray, grad_output: np.ndarray, bias: bool) -> Call:
    """Return a fully connected layer's weight and bias gradients."""
    samples, grad = _tensor(x), _tensor(grad_output)
    return lambda: (grad.t() @ samples, grad.sum(0) if bias else None)


def pool2d(spec: PoolSpec, x: np.ndarray) -> Call:
    """Return maximum or average pooling; a maximum with the places that its backward pass needs."""
    import torch

    image, window = _tensor(x), (spec.window, spec.stride, _even(spec))
    if spec.kind == "max":
        return lambda: torch.ops.aten.max_pool2d_with_indices(image, *window)
    return lambda: torch.ops.aten.avg_pool2d(image, *window)


def pool2d_gradient(spec: PoolSpec, x: np.ndarray, grad_output: np.ndarray) -> Call:
    """Return the backward pass of maximum or average pooling."""
    import torch

    image, grad, window = _tensor(x), _tensor(grad_output), (spec.window, spec.stride, _even(spec))
    if spec.kind == "max":
        _, places = torch.ops.aten.max_pool2d_with_indices(image, *window)
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return lambda: backward(grad, image, *window, [1, 1], False, places)
    return lambda: torch.ops.aten.avg_pool2d_backward(grad, image, *window, False, True, None)


def global_avgpool(x: np.ndarray) -> Call:
    """Return the mean over rows and columns."""
    image = _tensor(x)
    return lambda: image.mean((2, 3))


def global_avgpool_gradient(x: np.ndarray, grad_output: np.ndarray) -> Call:
    """Return the backward pass of the mean over rows and columns."""
    shape, pixels, grad = _tensor(x).shape, x.shape[1] * x.shape[2], _tensor(grad_output)
    return lambda: grad[:, :, None, None].expand(shape) / pixels


def batchnorm(spec: BatchNormSpec, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> Call:
    """Return batch normalisation in training, with its activation."""
    import torch

    image, scale, shift = _tensor(x), _tensor(gamma), _tensor(beta)
    running = torch.zeros(x.shape[-1]), torch.ones(x.shape[-1])
    options: tuple[Any, ...] = (True, spec.momentum, spec.epsilon)
    return lambda: _activate(torch.native_batch_norm(image, scale, shift, *running, *options)[0], spec.activation)


def batchnorm_gradients(
    spec: BatchNormSpec, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, grad_output: np.ndarray
) -> Call:
    """Return the backward pass of batch normalisation, through its activation."""
    import torch

    image, scale, shift, grad = _tensor(x), _tensor(gamma), _tensor(beta), _tensor(grad_output)
    running = torch.zeros(x.shape[-1]), torch.ones(x.shape[-1])
    y, mean, rstd = torch.native_batch_norm(image, scale, shift, *running, True, spec.momentum, spec.epsilon)
    y = _activate(y, spec.activation)
    rest = (*running, mean, rstd, True, spec.epsilon, [True, True, True])

    def call() -> Any:
        error = _activation_gradient(grad, y, spec.activation)
        return torch.ops.aten.native_batch_norm_backward(error, image, scale, *rest)

    return call


def activation(kind: str, x: np.ndarray) -> Call:
    """Return an activation that leaves its input."""
    import torch

    values = _tensor(x)
    return lambda: torch.relu(values) if kind == "relu" else torch.nn.functional.leaky_relu(values, LEAKY_SLOPE)


def activation_gradient(kind: str, y: np.ndarray, grad_output: np.ndarray) -> Call:
    """Return an activation's backward pass, from its output."""
    values, grad = _tensor(y), _tensor(grad_output)
    return lambda: _activation_gradient(grad, values, kind)


def add(kind: str | None, a: np.ndarray, b: np.ndarray) -> Call:
    """Return a sum with its activation."""
    left, right = _tensor(a), _tensor(b)
    return lambda: _activate(left + right, kind)


def set_num_threads(count: int) -> None:
    """Let PyTorch use so many threads.

    Raises
    ------
    ImportError
        If PyTorch is not installed.
    """
    import torch

    torch.set_num_threads(count)


def _tensor(array: np.ndarray) -> Any:
    """Return a view; images and filters under PyTorch's axis order."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.permute(0, 3, 1, 2) if array.ndim == 4 else tensor


def _even(spec: ConvSpec | PoolSpec) -> Pair:
    """Return the padding of rows and columns."""
    (top, bottom), (left, right) = spec.padding
    if top != bottom or left != right:
        raise ValueError(f"{spec.name}: padding {spec.padding} is uneven.")
    return top, left


def _activate(values: Any, kind: str | None) -> Any:
    """Return values after an in-place activation."""
    import torch

    if kind is None:
        return values
    return torch.relu_(values) if kind == "relu" else torch.nn.functional.leaky_relu_(values, LEAKY_SLOPE)


def _activation_gradient(grad: Any, y: Any, kind: str | None) -> Any:
    """Return the gradient before an activation."""
    import torch

    if kind is None:
        return grad
    if kind == "relu":
        return torch.ops.aten.threshold_backward(grad, y, 0.0)
    return torch.ops.aten.leaky_relu_backward(grad, y, LEAKY_SLOPE, True)
