"""The same model in PyTorch: an independent witness for values and gradients, and the rival in benchmarks.

PyTorch is optional and imported when a twin is made. The twin runs channels-last: our (N, H, W, C) images and
(K, R, S, C) filters are that layout under other axis names, so they pass without a copy. A flatten takes rows, columns
and channels in our order, which on channels-last memory is a view: fully connected weights are the same in both.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcnn.arrays import Padding
from hpcnn.nn.parameter import ParameterSet
from hpcnn.ops import LEAKY_SLOPE
from hpcnn.spec import (
    INPUT,
    Activation,
    ActivationSpec,
    AddSpec,
    BatchNormSpec,
    ConvSpec,
    DropoutSpec,
    FlattenSpec,
    GlobalAveragePoolSpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    PoolSpec,
    ShortcutSpec,
)


class TorchTwin:
    """A `ModelSpec` run by PyTorch, with `torch.optim.SGD`.

    Dropout draws PyTorch's own numbers: compare values at rate 0.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    dtype : str
        "float32" or "float64".
    momentum, weight_decay : float
        Of the optimizer; decay spares biases and norm parameters.

    Raises
    ------
    ImportError
        If PyTorch is not installed.
    """

    def __init__(
        self, spec: ModelSpec, *, dtype: str = "float32", momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        import torch

        self.spec = spec
        self._dtype = getattr(torch, dtype)
        shapes = {f"{layer.name}/{short}": shape for layer in spec.layers for short, shape in layer.parameters.items()}
        self._tensors: dict[str, Any] = {
            name: _to_torch(np.zeros(shape, dtype)).requires_grad_() for name, shape in shapes.items()
        }
        self._statistics: dict[str, Any] = {
            f"{layer.name}/{short}": torch.full(shape, float(short == "running_var"), dtype=self._dtype)
            for layer in spec.layers
            for short, shape in layer.statistics.items()
        }
        weights = [tensor for name, tensor in self._tensors.items() if name.endswith("/weight")]
        others = [tensor for name, tensor in self._tensors.items() if not name.endswith("/weight")]
        groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=0.0, momentum=momentum)

    def load(self, parameters: ParameterSet, statistics: dict[str, np.ndarray] | None = None) -> None:
        """Copy parameters, and statistics named "<layer>/<short name>", into the twin."""
        import torch

        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(_to_torch(parameters[name].value))
            for name, array in (statistics or {}).items():
                self._statistics[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))

    def forward(self, images: np.ndarray) -> np.ndarray:
        """Return the logits, shape (N, classes), of images (N, H, W, C) in evaluation."""
        import torch

        with torch.no_grad():
            logits: np.ndarray = self._run(images, training=False).numpy()
        return logits

    def backward(self, images: np.ndarray, labels: np.ndarray, *, label_smoothing: float = 0.0) -> float:
        """Return the mean loss of a batch in training and compute the gradients of the parameters."""
        import torch

        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(
            self._run(images, training=True), torch.from_numpy(labels).long(), label_smoothing=label_smoothing
        )
        loss.backward()
        return float(loss.detach())

    def step(self, images: np.ndarray, labels: np.ndarray, lr: float, *, label_smoothing: float = 0.0) -> float:
        """Return the mean loss of a batch after making one update with learning rate `lr`."""
        loss = self.backward(images, labels, label_smoothing=label_smoothing)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return loss

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the parameters by name, in our layouts."""
        return {name: _to_numpy(tensor.detach()) for name, tensor in self._tensors.items()}

    def gradients(self) -> dict[str, np.ndarray]:
        """Return the gradients of the last `backward` or `step` by name, in our layouts."""
        return {name: _to_numpy(tensor.grad) for name, tensor in self._tensors.items()}

    def statistics(self) -> dict[str, np.ndarray]:
        """Return the running statistics by name."""
        return {name: tensor.numpy() for name, tensor in self._statistics.items()}

    def _run(self, images: np.ndarray, *, training: bool) -> Any:
        """Return the logits; keeps each value only as long as a later layer reads it."""
        import torch

        last_reader = {source: layer.name for layer in self.spec.layers for source in layer.inputs}
        values = {INPUT: torch.from_numpy(images).to(self._dtype).permute(0, 3, 1, 2)}
        for layer in self.spec.layers:
            inputs = [values[source] for source in layer.inputs]
            values[layer.name] = self._apply(layer, inputs, training)
            for source in layer.inputs:
                if last_reader[source] == layer.name:
                    values.pop(source, None)
        return values[self.spec.layers[-1].name]

    def _apply(self, layer: LayerSpec, inputs: list[Any], training: bool) -> Any:
        """Return the output of one layer."""
        from torch.nn import functional

        x = inputs[0]
        own = {short: self._tensors[f"{layer.name}/{short}"] for short in layer.parameters}
        match layer:
            case ConvSpec():
                x, padding = _padded(x, layer.padding, 0.0)
                geometry = (layer.stride, padding, layer.dilation, layer.groups)
                return _activate(functional.conv2d(x, own["weight"], own.get("bias"), *geometry), layer.activation)
            case LinearSpec():
                return _activate(functional.linear(x, own["weight"], own.get("bias")), layer.activation)
            case BatchNormSpec():
                mean, var = (self._statistics[f"{layer.name}/{short}"] for short in ("running_mean", "running_var"))
                gamma, beta = own["gamma"], own["beta"]
                y = functional.batch_norm(x, mean, var, gamma, beta, training, layer.momentum, layer.epsilon)
                return _activate(y, layer.activation)
            case PoolSpec(kind="max"):
                x, padding = _padded(x, layer.padding, -float("inf"))
                return functional.max_pool2d(x, layer.window, layer.stride, padding)
            case PoolSpec():
                x, padding = _padded(x, layer.padding, 0.0)
                return functional.avg_pool2d(x, layer.window, layer.stride, padding)
            case GlobalAveragePoolSpec():
                return x.mean((2, 3))
            case AddSpec():
                return _activate(x + inputs[1], layer.activation)
            case ActivationSpec():
                return _activate(x.clone(), layer.kind)
            case DropoutSpec():
                return functional.dropout(x, layer.rate, training)
            case FlattenSpec():
                return x.permute(0, 2, 3, 1).flatten(1)
            case ShortcutSpec():
                kept = x[:, :, :: layer.stride[0], :: layer.stride[1]]
                return functional.pad(kept, (0, 0, 0, 0, 0, layer.out_channels - x.shape[1]))
        raise TypeError(f"{layer.name}: no PyTorch form is known for a {type(layer).__name__}")


def _activate(x: Any, kind: Activation | None) -> Any:
    """Return the activation of a value that nobody else reads; in place."""
    from torch.nn import functional

    if kind is None:
        return x
    return functional.relu(x, inplace=True) if kind == "relu" else functional.leaky_relu(x, LEAKY_SLOPE, inplace=True)


def _padded(x: Any, padding: Padding, value: float) -> tuple[Any, tuple[int, int]]:
    """Return the array and the padding that PyTorch is to add: uneven sides are padded here, with `value`."""
    from torch.nn import functional

    (top, bottom), (left, right) = padding
    if top == bottom and left == right:
        return x, (top, left)
    return functional.pad(x, (left, right, top, bottom), value=value), (0, 0)


def _to_torch(array: np.ndarray) -> Any:
    """Return a tensor; filters (K, R, S, C) become channels-last (K, C, R, S) on the same memory."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.permute(0, 3, 1, 2) if array.ndim == 4 else tensor


def _to_numpy(tensor: Any) -> np.ndarray:
    """Return an array in our layout."""
    tensor = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
    return np.ascontiguousarray(tensor.numpy())
