"""From a checkpoint and the data set it was trained on to a file that other programs run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hpcnn.arrays import zeros
from hpcnn.config import Config
from hpcnn.data import open_data
from hpcnn.errors import CheckpointError, ConfigError
from hpcnn.nn import models
from hpcnn.nn.onnx import to_onnx
from hpcnn.nn.parameter import ParameterSet
from hpcnn.nn.separation import OWN_STATE
from hpcnn.spec import ModelSpec
from hpcnn.train import checkpoint as checkpoints
from hpcnn.train.atomic import replacing
from hpcnn.train.checkpoint import Checkpoint

LARGEST_BYTES = (1 << 31) - (1 << 20)
"""What one ONNX file holds is a message of less than 2 GiB; the last MiB is for all but the weights."""


def export_onnx(path: Path, loaded: Checkpoint, config: Config) -> ModelSpec:
    """Write a trained network as an ONNX file and return its model; see `hpcnn.nn.onnx.to_onnx`. On one rank only.

    Parameters
    ----------
    path : Path
        The file, replaced whole or not at all.
    loaded : Checkpoint
        Whose parameters and running statistics are written; `load` has verified them.
    config : Config
        Of the run. The training images are opened for their mean, deviation and names of classes, not read.

    Raises
    ------
    ConfigError
        If the package `onnx` is not installed or the file cannot be written.
    DataError
        If the training images cannot be opened.
    CheckpointError
        If they are not those of the checkpoint, or it does not fit the model, or one file cannot hold it.
    """
    try:
        import onnx
    except ImportError:
        raise ConfigError("export: writing ONNX needs the package 'onnx'. pip install 'hpcnn[onnx]'.") from None

    with open_data(config.data, "train") as data:
        if data.fingerprint() != loaded.data_fingerprint:
            raise CheckpointError(
                f"export: '{loaded.path}' was trained on other images (={loaded.data_fingerprint}, those of"
                f" '{config.data.source}' are {data.fingerprint()}); the file holds the mean, deviation and classes of"
                " the training images. Name those with --set data.source=FOLDER."
            )
        spec = models.configured(config.model, data.image_shape, data.num_classes)
        mean, std, class_names = data.mean, data.std, data.class_names
    parameters = ParameterSet.of(spec.layers)
    if parameters.values.nbytes > LARGEST_BYTES:
        raise CheckpointError(
            f"export: '{loaded.path}' has {parameters.values.nbytes / 1e9:.1f} GB of parameters; one ONNX file holds"
            f" at most {LARGEST_BYTES / 1e9:.1f} GB. Train on smaller images, or a model with smaller layers."
        )
    statistics = {
        f"{layer.name}/{short}": zeros(shape) for layer in spec.layers for short, shape in layer.statistics.items()
    }
    loaded = replace(loaded, statistics={n: s for n, s in loaded.statistics.items() if not n.startswith(OWN_STATE)})
    checkpoints.restore_into(loaded, model=spec.name, parameters=parameters, statistics=statistics)
    model = to_onnx(
        spec,
        checkpoints.tensors_of(parameters) | statistics,
        mean=mean,
        std=std,
        class_names=class_names,
        metadata={"step": str(loaded.step), "epoch": str(loaded.epoch), "data_fingerprint": loaded.data_fingerprint},
    )
    try:
        with replacing(path) as temporary:
            onnx.save(model, str(temporary))
    except OSError as error:
        raise ConfigError(
            f"export: cannot write '{path}': {error.strerror}. Name a file in a folder that exists and has room."
        ) from None
    return spec
