"""A trained model as an ONNX graph: bytes of images in, logits out, for whatever reads that format.

The graph takes images as data sets hold them, uint8 (N, H, W, C), and brings them to a network's numbers itself; from
there on it is in ONNX's order of axes, (N, C, H, W). Numbers are float32, whatever precision trained them. Batch norms
stay nodes of their own with their running statistics (runtimes merge them into convolutions), dropout is gone.

References
----------
The operators, https://onnx.ai/onnx/operators, in the versions of operator set 17.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcnn import __version__
from hpcnn.arrays import Padding
from hpcnn.errors import ShapeError
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

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 17, 8
"""Of 2022: read by every runtime since. Nothing newer is needed."""
IMAGES, LOGITS, BATCH = "images", "logits", "N"


def to_onnx(
    spec: ModelSpec,
    tensors: Mapping[str, np.ndarray],
    *,
    mean: np.ndarray,
    std: np.ndarray,
    class_names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Return the model as ONNX, for any number of images at once.

    Its input "images" is uint8 (N, H, W, C), its output "logits" float32 (N, classes); the nodes have the names of the
    layers.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    tensors : dict of str to numpy.ndarray
        Parameters and running statistics by "<layer>/<short name>", in the layouts of `hpcnn.spec`.
    mean, std : numpy.ndarray, shape (C,)
        Of the training images' pixels divided by 255; the graph subtracts and divides.
    class_names : sequence of str
        Kept in the model's metadata as "class_names", a JSON list.
    metadata : dict of str to str, optional
        Kept there too.

    Raises
    ------
    ShapeError
        If ONNX has no place for a layer.
    ImportError
        If the package `onnx` is not installed.
    """
    from onnx import TensorProto, helper

    graph = _Graph(tensors)
    graph.normalise(mean, std)
    for layer in spec.layers:
        graph.add_layer(layer)
    graph.node("Identity", LOGITS, [graph.values[spec.layers[-1].name if spec.layers else INPUT]])
    proto = helper.make_graph(
        graph.nodes,
        spec.name,
        [helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, [BATCH, *spec.input_shape])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [BATCH, spec.num_classes])],
        graph.constants,
    )
    model = helper.make_model(
        proto,
        producer_name="hpcnn",
        producer_version=__version__,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, {"class_names": json.dumps(list(class_names)), **(metadata or {})})
    return model


class _Graph:
    """Nodes and constants so far, and under which name each layer's output is found."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.values: dict[str, str] = {INPUT: INPUT}
        self._tensors = tensors

    def node(self, operator: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output, of its own name."""
        from onnx import helper

        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant, in the order of its axes."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def tensor(self, layer: LayerSpec, short: str, axes: tuple[int, ...] | None = None) -> str:
        """Add one of a layer's tensors, with permuted axes if need be."""
        name = f"{layer.name}/{short}"
        value = np.asarray(self._tensors[name], np.float32)
        return self.constant(name, value if axes is None else value.transpose(axes))

    def normalise(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Turn bytes (N, H, W, C) into (bytes / 255 - mean) / std, float32 (N, C, H, W), as `data.augment` does."""
        from onnx import TensorProto

        mean, std = (np.asarray(value, np.float64) for value in (mean, std))
        scale = self.constant("input/scale", (1.0 / (255.0 * std)).astype(np.float32))
        shift = self.constant("input/shift", (mean / std).astype(np.float32))
        value = self.node("Cast", "input/cast", [IMAGES], to=TensorProto.FLOAT)
        value = self.node("Mul", "input/scaled", [value, scale])
        value = self.node("Sub", "input/normalised", [value, shift])
        self.node("Transpose", INPUT, [value], perm=[0, 3, 1, 2])

    def add_layer(self, layer: LayerSpec) -> None:
        """Add the nodes of a layer, and of the activation that is fused to it."""
        activation: Activation | None = getattr(layer, "activation", None)
        inputs = [self.values[source] for source in layer.inputs]
        name = f"{layer.name}/linear" if activation else layer.name
        value = self._compute(layer, name, inputs)
        self.values[layer.name] = self._activate(activation, layer.name, value) if activation else value

    def _compute(self, layer: LayerSpec, name: str, inputs: list[str]) -> str:
        """Add the nodes of a layer without its activation and return the last one's name."""
        match layer:
            case ConvSpec():
                return self._conv(layer, name, inputs)
            case LinearSpec():
                return self.node("Gemm", name, [*inputs, *self._weights(layer)], transB=1)
            case PoolSpec():
                window = {"kernel_shape": layer.window, "strides": layer.stride, "pads": _pads(layer.padding)}
                if layer.kind == "max":
                    return self.node("MaxPool", name, inputs, **window)
                return self.node("AveragePool", name, inputs, count_include_pad=1, **window)
            case GlobalAveragePoolSpec():
                return self.node("Flatten", name, [self.node("GlobalAveragePool", f"{name}/mean", inputs)])
            case BatchNormSpec():
                tensors = [self.tensor(layer, short) for short in ("gamma", "beta", "running_mean", "running_var")]
                return self.node("BatchNormalization", name, [*inputs, *tensors], epsilon=layer.epsilon)
            case ActivationSpec():
                return self._activate(layer.kind, name, *inputs)
            case AddSpec():
                return self.node("Add", name, inputs)
            case DropoutSpec():
                return inputs[0]
            case FlattenSpec():
                if len(layer.input_shape) == 3:  # features come in the order of rows, columns, channels
                    inputs = [self.node("Transpose", f"{name}/transposed", inputs, perm=[0, 2, 3, 1])]
                return self.node("Flatten", name, inputs)
            case ShortcutSpec():
                return self._shortcut(layer, name, inputs)
        raise ShapeError(f"onnx: layer '{layer.name}' is a {type(layer).__name__}, which cannot be written as ONNX.")

    def _conv(self, layer: ConvSpec, name: str, inputs: list[str]) -> str:
        return self.node(
            "Conv",
            name,
            [*inputs, *self._weights(layer, axes=(0, 3, 1, 2))],
            kernel_shape=layer.kernel_size,
            strides=layer.stride,
            pads=_pads(layer.padding),
            dilations=layer.dilation,
            group=layer.groups,
        )

    def _weights(self, layer: ConvSpec | LinearSpec, axes: tuple[int, ...] | None = None) -> list[str]:
        return [self.tensor(layer, "weight", axes)] + ([self.tensor(layer, "bias")] if layer.bias else [])

    def _shortcut(self, layer: ShortcutSpec, name: str, inputs: list[str]) -> str:
        """Take every `stride`-th row and column, and append channels of zeros."""

        def integers(what: str, *values: int) -> str:
            return self.constant(f"{name}/{what}", np.array(values, np.int64))

        rows, columns, channels = layer.input_shape
        bounds = integers("starts", 0, 0), integers("ends", rows, columns), integers("axes", 2, 3)
        value = self.node("Slice", f"{name}/slice", [*inputs, *bounds, integers("steps", *layer.stride)])
        more = layer.out_channels - channels
        return self.node("Pad", name, [value, integers("pads", 0, 0, 0, 0, 0, more, 0, 0)])

    def _activate(self, kind: Activation, name: str, value: str) -> str:
        if kind == "relu":
            return self.node("Relu", name, [value])
        return self.node("LeakyRelu", name, [value], alpha=LEAKY_SLOPE)


def _pads(padding: Padding) -> list[int]:
    """Return [top, left, bottom, right]."""
    (top, bottom), (left, right) = padding
    return [top, left, bottom, right]
