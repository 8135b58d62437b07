"""A model written down layer by layer: each helper adds one layer and returns its name for others to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcnn.arrays import Padding, Pair, Shape
from hpcnn.errors import ShapeError
from hpcnn.geometry import four_sided, pair
from hpcnn.spec import (
    INPUT,
    Activation,
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


class GraphBuilder:
    """Threads shapes from layer to layer.

    Each helper reads the layer added last unless `source` names another one.

    Parameters
    ----------
    name : str
        Of the model.
    input_shape : (H, W, C)
        One image.

    Attributes
    ----------
    last : str
        Name of the layer that was added last; "input" at first.
    """

    def __init__(self, name: str, input_shape: Shape) -> None:
        if len(input_shape) != 3 or min(input_shape) < 1:
            raise ShapeError(f"{name}: input_shape (={input_shape}) must be (rows, columns, channels), all at least 1.")
        self.name = name
        self.input_shape = input_shape
        self.last = INPUT
        self._shapes: dict[str, Shape] = {INPUT: input_shape}
        self._layers: list[LayerSpec] = []

    def shape(self, source: str | None = None) -> Shape:
        """Return the shape of one sample behind a layer, the last one unless named."""
        return self._shapes[source or self.last]

    def conv(
        self,
        name: str,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | Padding = 0,
        bias: bool = True,
        activation: Activation | None = None,
        source: str | None = None,
    ) -> str:
        """Add a convolution."""
        return self._append(
            ConvSpec,
            name,
            source,
            out_channels=out_channels,
            kernel_size=pair(kernel_size),
            stride=pair(stride),
            padding=four_sided(padding),
            bias=bias,
            activation=activation,
        )

    def linear(self, name: str, out_features: int, *, activation: Activation | None = None) -> str:
        """Add a fully connected layer, behind a flatten where its input is an image."""
        if len(self.shape()) != 1:
            self.flatten(f"flatten_{name}")
        return self._append(LinearSpec, name, None, out_features=out_features, activation=activation)

    def max_pool(self, name: str, window: int, *, stride: int | None = None, padding: int = 0) -> str:
        """Add a maximum pooling; the stride is the window unless given."""
        return self._pool("max", name, window, stride, padding)

    def average_pool(self, name: str, window: int, *, stride: int | None = None, padding: int = 0) -> str:
        """Add an average pooling; the stride is the window unless given."""
        return self._pool("average", name, window, stride, padding)

    def global_average_pool(self, name: str) -> str:
        """Add a mean over all rows and columns."""
        return self._append(GlobalAveragePoolSpec, name, None)

    def batchnorm(self, name: str, *, activation: Activation | None = None) -> str:
        """Add a batch normalisation."""
        return self._append(BatchNormSpec, name, None, activation=activation)

    def dropout(self, name: str, rate: float) -> str:
        """Add a dropout; none where `rate` is 0."""
        return self._append(DropoutSpec, name, None, rate=rate) if rate else self.last

    def add(self, name: str, source: str, *, activation: Activation | None = None) -> str:
        """Add the sum of the last layer and `source`."""
        return self._append(AddSpec, name, None, source, activation=activation)

    def shortcut(self, name: str, out_channels: int, *, stride: int | Pair = 1, source: str | None = None) -> str:
        """Add a shortcut without parameters: subsampled, with zero channels."""
        return self._append(ShortcutSpec, name, source, out_channels=out_channels, stride=pair(stride))

    def flatten(self, name: str) -> str:
        """Add a flatten of rows, columns and channels, in that order."""
        return self._append(FlattenSpec, name, None)

    def finish(self, num_classes: int, **fields: Any) -> ModelSpec:
        """Return the model; the last layer yields the logits."""
        return ModelSpec(
            name=self.name,
            input_shape=self.input_shape,
            num_classes=num_classes,
            layers=tuple(self._layers),
            **fields,
        )

    def _pool(self, kind: str, name: str, window: int, stride: int | None, padding: int) -> str:
        return self._append(
            PoolSpec,
            name,
            None,
            kind=kind,
            window=pair(window),
            stride=pair(window if stride is None else stride),
            padding=four_sided(padding),
        )

    def _append(
        self, make: Callable[..., LayerSpec], name: str, source: str | None, *others: str, **fields: Any
    ) -> str:
        first = source or self.last
        try:
            layer = make(name=name, inputs=(first, *others), input_shape=self._shapes[first], **fields)
            shape = layer.output_shape
        except ShapeError as error:
            raise ShapeError(
                f"{self.name}: layer '{name}' does not fit behind '{first}' (={self._shapes[first]}) with images of"
                f" {self.input_shape}; {error}"
            ) from None
        self._layers.append(layer)
        self._shapes[name] = shape
        self.last = name
        return name
