"""What a layer is, in integers: shapes, parameters, flops. No arrays, no ranks.

Models are tuples of these (`nn/models`), the planner splits them, `nn` builds layers from them, the program runs them.
Shapes are per sample: (H, W, C) for images, (features,) behind a flatten.
Legend: H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows, columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple, TypeAlias

from hpcnn.arrays import Padding, Pair, Shape
from hpcnn.errors import ShapeError
from hpcnn.geometry import NO_PADDING, Block, output_size

Activation: TypeAlias = Literal["relu", "leaky_relu"]
INPUT = "input"


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One node of a model graph.

    `inputs` names the layers that feed it ("input" is the batch of images); `input_shape` is the shape of each of them.
    """

    name: str
    inputs: tuple[str, ...]
    input_shape: Shape

    @property
    def output_shape(self) -> Shape:
        """Shape of one sample's output."""
        return self.input_shape

    @property
    def parameters(self) -> dict[str, Shape]:
        """Trained tensors by their short name, in the layouts (K, R, S, C) and (out, in)."""
        return {}

    @property
    def statistics(self) -> dict[str, Shape]:
        """Tensors that are kept and saved but not trained by gradient (running mean and variance)."""
        return {}

    @property
    def fan(self) -> tuple[int, int]:
        """Fan-in and fan-out of the weight, for initialisation."""
        return 0, 0

    @property
    def forward_flops(self) -> int:
        """Multiply-adds of one sample's forward pass, counted as two operations each; 0 for memory-bound layers."""
        return 0

    @property
    def num_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(prod(shape) for shape in self.parameters.values())


@dataclass(frozen=True, kw_only=True)
class ConvSpec(LayerSpec):
    """2-D convolution (cross-correlation), optionally with bias and a fused activation."""

    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Padding = NO_PADDING
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    activation: Activation | None = None

    def __post_init__(self) -> None:
        channels = self.input_shape[2]
        if channels % self.groups or self.out_channels % self.groups:
            raise ShapeError(
                f"{self.name}: in_channels (={channels}) and out_channels (={self.out_channels}) must be divisible by"
                f" groups (={self.groups})."
            )

    @property
    def output_shape(self) -> Shape:  # noqa: D102
        size = (self.input_shape[0], self.input_shape[1])
        rows, columns = output_size(size, self.kernel_size, self.stride, self.padding, self.dilation)
        return rows, columns, self.out_channels

    @property
    def parameters(self) -> dict[str, Shape]:  # noqa: D102
        weight = (self.out_channels, *self.kernel_size, self.input_shape[2] // self.groups)
        return {"weight": weight, "bias": (self.out_channels,)} if self.bias else {"weight": weight}

    @property
    def fan(self) -> tuple[int, int]:  # noqa: D102
        area = prod(self.kernel_size)
        return area * self.input_shape[2] // self.groups, area * self.out_channels // self.groups

    @property
    def forward_flops(self) -> int:  # noqa: D102
        return 2 * prod(self.output_shape) * prod(self.kernel_size) * self.input_shape[2] // self.groups


@dataclass(frozen=True, kw_only=True)
class LinearSpec(LayerSpec):
    """Fully connected layer y = x W^T + b, optionally with a fused activation."""

    out_features: int
    bias: bool = True
    activation: Activation | None = None

    def __post_init__(self) -> None:
        if len(self.input_shape) != 1:
            raise ShapeError(f"{self.name}: input (={self.input_shape}) must have one axis. Put a flatten before it.")

    @property
    def output_shape(self) -> Shape:  # noqa: D102
        return (self.out_features,)

    @property
    def parameters(self) -> dict[str, Shape]:  # noqa: D102
        weight = (self.out_features, self.input_shape[0])
        return {"weight": weight, "bias": (self.out_features,)} if self.bias else {"weight": weight}

    @property
    def fan(self) -> tuple[int, int]:  # noqa: D102
        return self.input_shape[0], self.out_features

    @property
    def forward_flops(self) -> int:  # noqa: D102
        return 2 * self.input_shape[0] * self.out_features


@dataclass(frozen=True, kw_only=True)
class PoolSpec(LayerSpec):
    """Maximum or average over a window. An average divides by the whole window, padding included."""

    kind: Literal["max", "average"]
    window: Pair
    stride: Pair
    padding: Padding = NO_PADDING

    @property
    def output_shape(self) -> Shape:  # noqa: D102
        size = (self.input_shape[0], self.input_shape[1])
        return *output_size(size, self.window, self.stride, self.padding), self.input_shape[2]


@dataclass(frozen=True, kw_only=True)
class GlobalAveragePoolSpec(LayerSpec):
    """Mean over all rows and columns: (H, W, C) -> (C,)."""

    @property
    def output_shape(self) -> Shape:  # noqa: D102
        return (self.input_shape[2],)


@dataclass(frozen=True, kw_only=True)
class BatchNormSpec(LayerSpec):
    """Batch normalisation over samples, rows and columns, optionally with a fused activation.

    Running statistics move by `momentum` towards the batch's mean and unbiased variance.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    activation: Activation | None = None

    @property
    def parameters(self) -> dict[str, Shape]:  # noqa: D102
        channels = (self.input_shape[-1],)
        return {"gamma": channels, "beta": channels}

    @property
    def statistics(self) -> dict[str, Shape]:  # noqa: D102
        channels = (self.input_shape[-1],)
        return {"running_mean": channels, "running_var": channels}


@dataclass(frozen=True, kw_only=True)
class ActivationSpec(LayerSpec):
    """ReLU, or leaky ReLU with slope 0.1 below zero."""

    kind: Activation = "relu"


@dataclass(frozen=True, kw_only=True)
class DropoutSpec(LayerSpec):
    """Zero each number with probability `rate` while training and scale the rest by 1 / (1 - rate)."""

    rate: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate < 1.0:
            raise ShapeError(f"{self.name}: rate (={self.rate}) must be at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class AddSpec(LayerSpec):
    """Sum of two inputs of one shape (a residual join), optionally with a fused activation."""

    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class FlattenSpec(LayerSpec):
    """(H, W, C) -> (H * W * C,), in that order."""

    @property
    def output_shape(self) -> Shape:  # noqa: D102
        return (prod(self.input_shape),)


@dataclass(frozen=True, kw_only=True)
class ShortcutSpec(LayerSpec):
    """Shortcut without parameters: every `stride`-th row and column, then zero channels up to `out_channels`.

    Option A of He, Zhang, Ren, Sun, "Deep residual learning for image recognition", arXiv:1512.03385.
    """

    out_channels: int
    stride: Pair = (1, 1)

    def __post_init__(self) -> None:
        if self.out_channels < self.input_shape[2]:
            raise ShapeError(
                f"{self.name}: out_channels (={self.out_channels}) must be at least in_channels"
                f" (={self.input_shape[2]})."
            )

    @property
    def output_shape(self) -> Shape:  # noqa: D102
        rows, columns = output_size((self.input_shape[0], self.input_shape[1]), (1, 1), self.stride)
        return rows, columns, self.out_channels


@dataclass(frozen=True, kw_only=True)
class PartialSumSpec(LayerSpec):
    """What one rank does of a layer whose input channels are cut: a share of its sums, and the end of some of them.

    `product` sums over some of the input channels, without bias and activation. The sums over all of them are this
    rank's for `num_completed` output channels, of which it has the bias.
    """

    product: ConvSpec | LinearSpec
    num_completed: int
    bias: bool
    activation: Activation | None

    @property
    def output_shape(self) -> Shape:  # noqa: D102
        return self.product.output_shape

    @property
    def parameters(self) -> dict[str, Shape]:  # noqa: D102
        return self.product.parameters | ({"bias": (self.num_completed,)} if self.bias else {})


class Part(NamedTuple):
    """What of a layer one rank has.

    Attributes
    ----------
    spec : LayerSpec
        The layer as this rank computes it: with the padding of its tile and the channels that it has.
    box : tuple of Block
        Where what it computes lies in one sample's output.
    tensors : dict of str to tuple of Block
        Where its parts of the parameters and statistics lie in the layer's, by short name.
    """

    spec: LayerSpec
    box: tuple[Block, ...]
    tensors: Mapping[str, tuple[Block, ...]]


def whole(layer: LayerSpec) -> Part:
    """Return all of a layer."""

    def everything(shape: Shape) -> tuple[Block, ...]:
        return tuple(Block(0, size) for size in shape)

    tensors = {short: everything(shape) for short, shape in (layer.parameters | layer.statistics).items()}
    return Part(layer, everything(layer.output_shape), tensors)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model: layers in an order in which each comes after those it reads. The last layer's output is the logits.

    `initial_weights` is the rule that weights are drawn by: "he" before activations and batch norms and Glorot
    elsewhere, or "glorot" everywhere (see `nn/initialise.py`).
    """

    name: str
    input_shape: Shape
    num_classes: int
    layers: tuple[LayerSpec, ...]
    initial_weights: Literal["he", "glorot"] = "he"

    def __post_init__(self) -> None:
        shapes: dict[str, Shape] = {INPUT: self.input_shape}
        for layer in self.layers:
            for source in layer.inputs:
                if source not in shapes:
                    raise ShapeError(
                        f"{self.name}: layer '{layer.name}' reads '{source}', which no earlier layer makes."
                    )
                if shapes[source] != layer.input_shape:
                    raise ShapeError(
                        f"{self.name}: layer '{layer.name}' expects an input of {layer.input_shape} but '{source}'"
                        f" yields {shapes[source]}."
                    )
            if layer.name in shapes:
                raise ShapeError(f"{self.name}: two layers are named '{layer.name}'; names must differ.")
            shapes[layer.name] = layer.output_shape

    @property
    def num_parameters(self) -> int:
        """Number of trained numbers in all layers."""
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one sample's forward pass through convolutions and FC layers."""
        return sum(layer.forward_flops for layer in self.layers)
