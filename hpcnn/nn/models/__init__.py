"""The networks, by name. A model is a function that returns a `ModelSpec`; it holds no numbers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from hpcnn.arrays import Shape
from hpcnn.errors import ConfigError
from hpcnn.nn.models.alexnet import alexnet
from hpcnn.nn.models.lenet import lenet5
from hpcnn.nn.models.resnet import resnet20, resnet50
from hpcnn.nn.models.vgg import vgg, vgg_32
from hpcnn.nn.models.yolo import yolo16
from hpcnn.spec import ModelSpec

__all__ = ["build", "names"]

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


def names() -> tuple[str, ...]:
    """Return the names that `build` knows."""
    return tuple(_MODELS)


def build(name: str, input_shape: Shape, num_classes: int, dropout: float | None = None) -> ModelSpec:
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

    Raises
    ------
    ConfigError
        If the name is unknown or there is not at least one class.
    ShapeError
        If the images are too small for the network.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Models are: {', '.join(_MODELS)}."
        raise ConfigError(f"model: unknown name '{name}'. {hint}")
    if num_classes < 1:
        raise ConfigError(f"model: num_classes (={num_classes}) must be at least 1.")
    rate = {} if dropout is None else {"dropout": dropout}
    return _MODELS[name](tuple(input_shape), num_classes, **rate)
