"""The operators once more, slowly: float64 loops written straight from the formulas. Never imports hpcnn.ops.

Legend: N samples, H W input rows and columns, C input channels, K filters, R S window rows and columns, P Q output rows
and columns. Padding is ((top, bottom), (left, right)); stride, dilation and sizes are (rows, columns).
"""

from __future__ import annotations

from itertools import product

import numpy as np

SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.1}
"""Slope of each activation below zero."""


def output_size(input_size, kernel_size, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1)):
    """Count, along each axis, the places where the window fits into the padded image."""
    sizes = []
    for axis in (0, 1):
        last = input_size[axis] + sum(padding[axis]) - 1
        reach = (kernel_size[axis] - 1) * dilation[axis]
        sizes.append(len([start for start in range(0, last + 1, stride[axis]) if start + reach <= last]))
    return tuple(sizes)


def _reads(input_size, kernel_size, stride, padding, dilation):
    """Yield (p, q, r, s, h, w) wherever output (p, q) reads a real pixel (h, w) through place (r, s) of its window."""
    P, Q = output_size(input_size, kernel_size, stride, padding, dilation)
    for p, q, r, s in product(range(P), range(Q), range(kernel_size[0]), range(kernel_size[1])):
        h = p * stride[0] + r * dilation[0] - padding[0][0]
        w = q * stride[1] + s * dilation[1] - padding[1][0]
        if 0 <= h < input_size[0] and 0 <= w < input_size[1]:
            yield p, q, r, s, h, w


def activation(x, kind):
    """Return x where it is positive, else the activation's slope times x."""
    return np.where(x > 0, x, SLOPES[kind] * x)


def activation_gradient(grad, x, kind):
    """Return the gradient with respect to x, the activation's input."""
    return np.where(x > 0, grad, SLOPES[kind] * grad)


def conv2d(x, weight, bias=None, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """y[n, p, q, k] = bias[k] + sum over r, s, c of x[n, h(p, r), w(q, s), c of k's group] weight[k, r, s, c]."""
    x, weight = np.float64(x), np.float64(weight)
    K, R, S, depth = weight.shape
    y = np.zeros((len(x), *output_size(x.shape[1:3], (R, S), stride, padding, dilation), K))
    for p, q, r, s, h, w in _reads(x.shape[1:3], (R, S), stride, padding, dilation):
        for k in range(K):
            first = k // (K // groups) * depth
            y[:, p, q, k] += x[:, h, w, first : first + depth] @ weight[k, r, s]
    return y if bias is None else y + np.float64(bias)


def conv2d_gradients(x, weight, grad, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """Return the gradients of sum(conv2d(x, weight, bias) * grad) with respect to x, weight and bias."""
    x, weight, grad = np.float64(x), np.float64(weight), np.float64(grad)
    K, R, S, depth = weight.shape
    grad_x, grad_weight = np.zeros_like(x), np.zeros_like(weight)
    for p, q, r, s, h, w in _reads(x.shape[1:3], (R, S), stride, padding, dilation):
        for k in range(K):
            first = k // (K // groups) * depth
            channels = slice(first, first + depth)
            grad_x[:, h, w, channels] += grad[:, p, q, k, None] * weight[k, r, s]
            grad_weight[k, r, s] += grad[:, p, q, k] @ x[:, h, w, channels]
    return grad_x, grad_weight, grad.sum((0, 1, 2))


def linear(x, weight, bias=None):
    """y[n, o] = bias[o] + sum over i of x[n, i] weight[o, i]."""
    y = np.array([[np.sum(np.float64(row) * np.float64(unit)) for unit in weight] for row in x])
    return y if bias is None else y + np.float64(bias)


def linear_gradients(x, weight, grad):
    """Return the gradients of sum(linear(x, weight, bias) * grad) with respect to x, weight and bias."""
    x, weight, grad = np.float64(x), np.float64(weight), np.float64(grad)
    grad_x, grad_weight = np.zeros_like(x), np.zeros_like(weight)
    for n, o in np.ndindex(*grad.shape):
        grad_x[n] += grad[n, o] * weight[o]
        grad_weight[o] += grad[n, o] * x[n]
    return grad_x, grad_weight, grad.sum(0)


def maxpool2d(x, window, stride, padding=((0, 0), (0, 0))):
    """Return the maximum of each window's pixels, and the place r * S + s of the first one that has it."""
    x = np.float64(x)
    shape = (len(x), *output_size(x.shape[1:3], window, stride, padding), x.shape[3])
    y, argmax = np.full(shape, np.nan), np.full(shape, -1)
    for p, q, r, s, h, w in _reads(x.shape[1:3], window, stride, padding, (1, 1)):
        wins = (argmax[:, p, q] < 0) | (x[:, h, w] > y[:, p, q])
        y[:, p, q][wins] = x[:, h, w][wins]
        argmax[:, p, q][wins] = r * window[1] + s
    return y, argmax


def maxpool2d_gradient(grad, argmax, input_size, window, stride, padding=((0, 0), (0, 0))):
    """Return the gradient of sum(maxpool2d(x) * grad) with respect to x."""
    grad_x = np.zeros((len(grad), *input_size, grad.shape[3]))
    for p, q, r, s, h, w in _reads(input_size, window, stride, padding, (1, 1)):
        grad_x[:, h, w] += np.where(argmax[:, p, q] == r * window[1] + s, np.float64(grad[:, p, q]), 0.0)
    return grad_x


def avgpool2d(x, window, stride, padding=((0, 0), (0, 0))):
    """Return the sum of each window's pixels, divided by the size of the whole window."""
    y = np.zeros((len(x), *output_size(x.shape[1:3], window, stride, padding), x.shape[3]))
    for p, q, _, _, h, w in _reads(x.shape[1:3], window, stride, padding, (1, 1)):
        y[:, p, q] += np.float64(x[:, h, w]) / (window[0] * window[1])
    return y


def avgpool2d_gradient(grad, input_size, window, stride, padding=((0, 0), (0, 0))):
    """Return the gradient of sum(avgpool2d(x) * grad) with respect to x."""
    grad_x = np.zeros((len(grad), *input_size, grad.shape[3]))
    for p, q, _, _, h, w in _reads(input_size, window, stride, padding, (1, 1)):
        grad_x[:, h, w] += np.float64(grad[:, p, q]) / (window[0] * window[1])
    return grad_x


def batchnorm_statistics(x):
    """Return mean and biased variance over all axes but the last."""
    rows = np.float64(x).reshape(-1, x.shape[-1])
    mean = sum(rows) / len(rows)
    return mean, sum((row - mean) ** 2 for row in rows) / len(rows)


def batchnorm(x, gamma, beta, epsilon, kind=None, statistics=None):
    """Return gamma (x - mean) / sqrt(var + epsilon) + beta, through an activation."""
    mean, var = batchnorm_statistics(x) if statistics is None else statistics
    return activation((np.float64(x) - mean) / np.sqrt(var + epsilon) * gamma + beta, kind)


def batchnorm_gradients(grad, x, gamma, beta, epsilon, kind=None):
    """Return the gradients of sum(batchnorm(x, gamma, beta) * grad) with respect to x, gamma and beta.

    By the chain rule, one statistic after the other, as in Ioffe and Szegedy (arXiv:1502.03167), section 3.
    """
    x, gamma = np.float64(x), np.float64(gamma)
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    mean, var = batchnorm_statistics(x)
    normalised = (x - mean) / np.sqrt(var + epsilon)
    grad = activation_gradient(np.float64(grad), normalised * gamma + beta, kind)
    grad_normalised = grad * gamma
    grad_var = (grad_normalised * (x - mean)).sum(axes) * -0.5 * (var + epsilon) ** -1.5
    grad_mean = -grad_normalised.sum(axes) / np.sqrt(var + epsilon) + grad_var * (-2.0 * (x - mean)).sum(axes) / count
    grad_x = grad_normalised / np.sqrt(var + epsilon) + grad_var * 2.0 * (x - mean) / count + grad_mean / count
    return grad_x, (grad * normalised).sum(axes), grad.sum(axes)


def softmax_cross_entropy(logits, labels, global_batch, label_smoothing=0.0):
    """Return loss, number of hits and gradient, sample by sample."""
    loss, hits, grad = 0.0, 0, np.zeros(logits.shape)
    classes = logits.shape[1]
    for n, label in enumerate(labels):
        z = np.float64(logits[n])
        log_probability = z - z.max() - np.log(np.sum(np.exp(z - z.max())))
        target = np.array([label_smoothing / classes + (1.0 - label_smoothing) * (k == label) for k in range(classes)])
        loss -= np.sum(target * log_probability) / global_batch
        hits += int(np.argmax(z) == label)
        grad[n] = (np.exp(log_probability) - target) / global_batch
    return loss, hits, grad
