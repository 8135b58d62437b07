"""The networks, by name. A model is a function that returns a `ModelSpec`; it holds no numbers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from hpcnn.arrays import Shape
from hpcnn.config import ModelConfig
from hpcnn.errors import ConfigError
from hpcnn.nn.models.alexnet import alexnet
from hpcnn.nn.models.lenet import lenet5
from hpcnn.nn.models.resnet import resnet20, resnet50
from hpcnn.nn.models.vgg import vgg, vgg_32
from hpcnn.nn.models.yolo import yolo16
from hpcnn.spec import ModelSpec

__all__ = ["build", "configured", "names"]

_MODELS: dict[str, Callable[..., ModelSpec]] = {
    "lenet5": lenet5,
    "alexnet": alexnet,
    "vgg11": partial(vgg, 11),
    "vgg16": partial(vgg, 16),
    "vgg11-32": partial(vgg_32, 11),
    "vgg16-32": partial(vgg_32, 16),
    "resnet20": resnet20,
    "resnet50": resnet50,
    "yolo16": yolo16,
}
_WITHOUT_BATCHNORM = ("yolo16",)
"""Models that are built with batch norm, and can be built without."""


def names() -> tuple[str, ...]:
    """Return the names that `build` knows."""
    return tuple(_MODELS)


def configured(config: ModelConfig, input_shape: Shape, num_classes: int) -> ModelSpec:
    """Return the model that a configuration asks for; see `build`."""
    return build(config.name, input_shape, num_classes, config.dropout, batchnorm=config.batchnorm)


def build(
    name: str, input_shape: Shape, num_classes: int, dropout: float | None = None, *, batchnorm: bool = True
) -> ModelSpec:
    """Return the model `name` for images of one shape.

    Parameters
    ----------
    name : str
        One of `names()`.
    input_shape : (H, W, C)
        One image.
    num_classes : int
        Number of logits.
    dropout : float, optional
        Rate of the dropout layers, 0 for none; the published rate when left out. A model that is published without
        dropout gets a layer of this rate before its classifier.
    batchnorm : bool
        False: build a model that is published with batch norm without it, where that is known how.

    Raises
    ------
    ConfigError
        If the name is unknown, there is not at least one class, or the model cannot be built without batch norm.
    ShapeError
        If the images are too small for the network.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Models are: {', '.join(_MODELS)}."
        raise ConfigError(f"model: unknown name '{name}'. {hint}")
    if num_classes < 1:
        raise ConfigError(f"model: num_classes (={num_classes}) must be at least 1.")
    if not batchnorm and name not in _WITHOUT_BATCHNORM:
        raise ConfigError(
            f"model: '{name}' has no other form to which model.batchnorm (=false) could lead; of"
            f" {', '.join(_WITHOUT_BATCHNORM)} there is one. Leave model.batchnorm out."
        )
    chosen = ({} if dropout is None else {"dropout": dropout}) | ({} if batchnorm else {"batchnorm": False})
    return _MODELS[name](tuple(input_shape), num_classes, **chosen)
