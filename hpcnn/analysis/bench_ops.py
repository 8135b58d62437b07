"""How fast each operator is on the layers of known networks, beside PyTorch where it is installed.

Every distinct layer of the models is timed once, forward and each gradient, and carries how often it occurs. Ours and
PyTorch's take turns in the same process, on the same memory (channels-last is NHWC) and as many threads; fully
connected weights lie as either keeps them, ours (in, out) and PyTorch's (out, in).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpcnn import configuration, ops, rng
from hpcnn.analysis import torch_ops
from hpcnn.data import open_data
from hpcnn.nn import models
from hpcnn.nn.parameter import ParameterSet, assign
from hpcnn.ops import update
from hpcnn.spec import (
    INPUT,
    ActivationSpec,
    AddSpec,
    BatchNormSpec,
    ConvSpec,
    GlobalAveragePoolSpec,
    LayerSpec,
    LinearSpec,
    PoolSpec,
)

MODELS = ("vgg16", "resnet50", "alexnet")

# A turn lasts at least this long, so that short operations are timed over many calls.
SHORTEST_TURN_S = 2e-3
# OpenMP threads go on spinning for a while after their work; between turns they are given time to fall asleep.
PAUSE_S = 2e-3


@dataclass(frozen=True, kw_only=True)
class OpTime:
    """One operation on one shape. Times are medians and minima over the turns, in seconds a call."""

    kind: str
    layer: str
    count: int
    flops: int
    num_bytes: int
    median_s: float
    fastest_s: float
    peer_median_s: float | None
    peer_fastest_s: float | None

    @property
    def speedup(self) -> float | None:
        """Peer's median time over ours; None without a peer."""
        return None if self.peer_median_s is None else self.peer_median_s / self.median_s

    @property
    def rate(self) -> str:
        """Median speed: operations where there are many a byte, else bytes of arrays read and written."""
        if self.flops:
            return f"{self.flops / self.median_s / 1e9:.0f} GFLOP/s"
        return f"{self.num_bytes / self.median_s / 1e9:.1f} GB/s"


@dataclass(frozen=True)
class _Case:
    """One operation ready to run; `prepare_peer` makes PyTorch's."""

    kind: str
    own: Callable[[], Any]
    prepare_peer: Callable[[], torch_ops.Call]
    arrays: tuple[np.ndarray | None, ...]
    flops: int = 0


def bench_ops(names: Sequence[str] = MODELS, batch: int = 16, repeats: int = 5, peer: bool = True) -> list[OpTime]:
    """Return the times of every operation on every distinct layer of some models.

    Parameters
    ----------
    names : sequence of str
        Presets; each names a model, and data whose images and classes shape it.
    batch : int
        Samples.
    repeats : int
        Timed turns of each operation, after one that is not timed.
    peer : bool
        Time PyTorch too, if it is installed.
    """
    if peer:
        try:
            torch_ops.set_num_threads(update.num_threads())
        except ImportError:
            peer = False
    layers: Counter[LayerSpec] = Counter()
    for name in names:
        config = configuration.load(name)
        with closing(open_data(config.data, "train")) as data:
            spec = models.configured(config.model, data.image_shape, data.num_classes)
        layers.update(map(_anonymous, spec.layers))
    rows = []
    for layer, count in layers.items():
        for case in _cases(layer, batch):
            times, peer_times = _take_turns(case, repeats, peer)
            rows.append(
                OpTime(
                    kind=case.kind,
                    layer=_text(layer, batch),
                    count=count,
                    flops=case.flops,
                    num_bytes=sum(array.nbytes for array in case.arrays if array is not None),
                    median_s=statistics.median(times),
                    fastest_s=min(times),
                    peer_median_s=statistics.median(peer_times) if peer_times else None,
                    peer_fastest_s=min(peer_times, default=None),
                )
            )
    return rows


def format_table(rows: Sequence[OpTime]) -> str:
    """Return the rows as text, a block for each kind of operation, then a line for each kind and for all."""
    lines = [
        f"{'operation and layer':<58} {'times':>5} {'median ms':>10} {'speed':>13} {'PyTorch ms':>11} {'ratio':>6}"
    ]
    kinds = list(dict.fromkeys(row.kind for row in rows))
    for kind in kinds:
        lines.append(kind)
        for row in rows:
            if row.kind == kind:
                peer = "-" if row.peer_median_s is None else f"{row.peer_median_s * 1e3:.2f}"
                ratio = "-" if row.speedup is None else f"{row.speedup:.2f}"
                lines.append(
                    f"  {row.layer:<56} {row.count:>5} {row.median_s * 1e3:>10.2f} {row.rate:>13} {peer:>11} {ratio:>6}"
                )
    lines += ["", "geometric mean of ratio (PyTorch's time / ours), each layer as often as it occurs"]
    for kind in [*kinds, *(["convolutions"] if len(kinds) > 1 else []), "all"]:
        chosen = [row for row in rows if kind in ("all", row.kind) or (kind, row.kind[:4]) == ("convolutions", "conv")]
        lines.append(_summary(kind, chosen))
    return "\n".join(lines)


def geometric_mean(rows: Sequence[OpTime]) -> float | None:
    """Return the geometric mean of the speed-ups, each layer as often as it occurs; None without a peer."""
    compared = [(row.count, row.speedup) for row in rows if row.speedup is not None]
    if not compared:
        return None
    total = sum(count for count, _ in compared)
    return math.exp(sum(count * math.log(speedup) for count, speedup in compared) / total)


def _summary(kind: str, rows: Sequence[OpTime]) -> str:
    """Return the line of one kind: how many, geometric mean, and time over all occurrences."""
    mean = geometric_mean(rows)
    own = sum(row.count * row.median_s for row in rows)
    peer = sum(row.count * row.peer_median_s for row in rows if row.peer_median_s is not None)
    text = f"{kind:<28} {sum(row.count for row in rows):>4} operations {own * 1e3:>10.1f} ms"
    return text if mean is None else f"{text}   PyTorch {peer * 1e3:>10.1f} ms   geometric mean {mean:.2f}"


def _take_turns(case: _Case, repeats: int, peer: bool) -> tuple[list[float], list[float]]:
    """Return seconds a call of ours and of PyTorch's, over `repeats` turns each."""
    calls: list[Callable[[], Any]] = [case.own]
    if peer:
        calls.append(case.prepare_peer())
    times: list[list[float]] = [[], []]
    lengths = [max(1, min(100, math.ceil(SHORTEST_TURN_S / max(_seconds(call, 2), 1e-6)))) for call in calls]
    for turn in range(repeats):
        for side in range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls))):
            time.sleep(PAUSE_S)
            if lengths[side] > 1:
                calls[side]()
            times[side].append(_seconds(calls[side], lengths[side]))
    return times[0], times[1]


def _seconds(call: Callable[[], Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _anonymous(layer: LayerSpec) -> LayerSpec:
    """Return the layer without its name; of its inputs, only whether they are the batch of images."""
    return replace(layer, name="", inputs=tuple(INPUT if source == INPUT else "" for source in layer.inputs))


def _text(layer: LayerSpec, batch: int) -> str:
    """Return the layer's shapes and parameters on one line."""
    text = "x".join(map(str, (batch, *layer.input_shape)))
    match layer:
        case ConvSpec():
            text += f" -> {layer.out_channels}, {layer.kernel_size[0]}x{layer.kernel_size[1]} /{layer.stride[0]}"
        case LinearSpec():
            text += f" -> {layer.out_features}"
        case PoolSpec():
            text += f", {layer.kind} {layer.window[0]}x{layer.window[1]} /{layer.stride[0]}"
    activation = getattr(layer, "activation", None)
    return text if activation is None else f"{text}, {activation}"


def _draw(what: str, *shape: int) -> np.ndarray:
    """Return normal float32 numbers, equal in every run."""
    return rng.generator(1, f"bench ops: {what}").standard_normal(shape, dtype=np.float32)


def _cases(layer: LayerSpec, batch: int) -> Iterator[_Case]:
    """Return the operations of one layer; none for those that move no numbers."""
    x, grad = _draw("x", batch, *layer.input_shape), _draw("grad", batch, *layer.output_shape)
    match layer:
        case ConvSpec():
            yield from _convolution(layer, x, grad)
        case LinearSpec():
            yield from _linear(layer, x, grad)
        case BatchNormSpec():
            yield from _batchnorm(layer, x, grad)
        case PoolSpec() | GlobalAveragePoolSpec():
            yield from _pool(layer, x, grad)
        case AddSpec():
            yield _Case(
                "add",
                lambda: ops.add_forward(x, grad, layer.activation),
                lambda: torch_ops.add(layer.activation, x, grad),
                (x, grad, x),
            )
        case ActivationSpec():
            yield _Case(
                "activation",
                lambda: ops.activation_forward(x, layer.kind),
                lambda: torch_ops.activation(layer.kind, x),
                (x, x),
            )
    kind = layer.kind if isinstance(layer, ActivationSpec) else getattr(layer, "activation", None)
    if kind is not None and not isinstance(layer, BatchNormSpec):
        y = np.maximum(_draw("y", batch, *layer.output_shape), 0)
        yield _Case(
            "activation gradient",
            lambda: ops.activation_backward(grad, y, kind),
            lambda: torch_ops.activation_gradient(kind, y, grad),
            (grad, y, grad),
        )


def _convolution(layer: ConvSpec, x: np.ndarray, grad: np.ndarray) -> Iterator[_Case]:
    weight = _draw("weight", *layer.parameters["weight"])
    bias = _draw("bias", layer.out_channels) if layer.bias else None
    geometry: dict[str, Any] = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
    flops, size = len(x) * layer.forward_flops, (x.shape[1], x.shape[2])
    out = np.empty_like(weight), np.empty_like(bias) if bias is not None else None
    yield _Case(
        "conv2d",
        lambda: ops.conv2d_forward(x, weight, bias, activation=layer.activation, **geometry),
        lambda: torch_ops.conv2d(layer, x, weight, bias),
        (x, weight, grad),
        flops,
    )
    if INPUT not in layer.inputs:
        yield _Case(
            "conv2d input gradient",
            lambda: ops.conv2d_backward_input(grad, weight, size, **geometry),
            lambda: torch_ops.conv2d_gradients(layer, x, weight, grad, (True, False, False)),
            (x, weight, grad),
            flops,
        )
    yield _Case(
        "conv2d weight gradient",
        lambda: ops.conv2d_backward_weight(x, grad, layer.kernel_size, bias=layer.bias, out=out, **geometry),
        lambda: torch_ops.conv2d_gradients(layer, x, weight, grad, (False, True, layer.bias)),
        (x, weight, grad),
        flops,
    )


def _linear(layer: LinearSpec, x: np.ndarray, grad: np.ndarray) -> Iterator[_Case]:
    parameters = ParameterSet((short, shape, False) for short, shape in layer.parameters.items())
    for parameter in parameters.parameters:
        assign(parameter.value, _draw(parameter.name, *parameter.value.shape))
    weight, grad_weight = parameters["weight"].value, parameters["weight"].grad
    bias, grad_bias = (parameters["bias"].value, parameters["bias"].grad) if layer.bias else (None, None)
    out = grad_weight, grad_bias
    arrays, flops = (x, weight, grad), len(x) * layer.forward_flops
    yield _Case(
        "linear",
        lambda: ops.linear_forward(x, weight, bias, activation=layer.activation),
        lambda: torch_ops.linear(layer, x, np.ascontiguousarray(weight), bias),
        arrays,
        flops,
    )
    yield _Case(
        "linear input gradient",
        lambda: ops.linear_backward_input(grad, weight),
        lambda: torch_ops.linear_input_gradient(np.ascontiguousarray(weight), grad),
        arrays,
        flops,
    )
    yield _Case(
        "linear weight gradient",
        lambda: ops.linear_backward_weight(x, grad, bias=layer.bias, out=out),
        lambda: torch_ops.linear_weight_gradient(x, grad, layer.bias),
        arrays,
        flops,
    )


def _batchnorm(layer: BatchNormSpec, x: np.ndarray, grad: np.ndarray) -> Iterator[_Case]:
    gamma, beta = _draw("gamma", x.shape[-1]), _draw("beta", x.shape[-1])
    options: dict[str, Any] = {"epsilon": layer.epsilon, "activation": layer.activation}
    y, mean, var, mask = ops.batchnorm_forward(x, gamma, beta, **options)
    yield _Case(
        "batchnorm",
        lambda: ops.batchnorm_forward(x, gamma, beta, **options),
        lambda: torch_ops.batchnorm(layer, x, gamma, beta),
        (x, y),
    )
    yield _Case(
        "batchnorm gradient",
        lambda: ops.batchnorm_backward(grad, x, gamma, mean, var, mask, **options),
        lambda: torch_ops.batchnorm_gradients(layer, x, gamma, beta, grad),
        (x, grad, y),
    )


def _pool(layer: PoolSpec | GlobalAveragePoolSpec, x: np.ndarray, grad: np.ndarray) -> Iterator[_Case]:
    size = (x.shape[1], x.shape[2])
    if isinstance(layer, GlobalAveragePoolSpec):
        name = "global average pool"
        forward, backward = ops.global_avgpool_forward, ops.global_avgpool_backward
        peers = torch_ops.global_avgpool, torch_ops.global_avgpool_gradient
        yield _Case(name, lambda: forward(x), lambda: peers[0](x), (x, grad))
        yield _Case(f"{name} gradient", lambda: backward(grad, size), lambda: peers[1](x, grad), (x, grad))
        return
    options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding}
    name, window = f"{layer.kind} pool", layer.window
    own: Callable[[], Any] = lambda: ops.avgpool2d_forward(x, window, **options)  # noqa: E731
    own_gradient: Callable[[], Any] = lambda: ops.avgpool2d_backward(grad, size, window, **options)  # noqa: E731
    places = None
    if layer.kind == "max":
        _, places = ops.maxpool2d_forward(x, window, **options)
        own = lambda: ops.maxpool2d_forward(x, window, **options)  # noqa: E731
        own_gradient = lambda: ops.maxpool2d_backward(grad, places, size, window, **options)  # noqa: E731
    yield _Case(name, own, lambda: torch_ops.pool2d(layer, x), (x, grad, places))
    peer_gradient = lambda: torch_ops.pool2d_gradient(layer, x, grad)  # noqa: E731
    yield _Case(f"{name} gradient", own_gradient, peer_gradient, (x, grad, places))
