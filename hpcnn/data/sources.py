"""From `data.source` to a data set."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from hpcnn.config import DataConfig
from hpcnn.data.dataset import DataSet
from hpcnn.data.hdf5 import Hdf5DataSet
from hpcnn.data.synthetic import SyntheticDataSet
from hpcnn.errors import DataError

TEST_SHARE = 8
"""A synthetic test set has one image for so many of the training set."""


def open_data(config: DataConfig, split: Literal["train", "test"]) -> DataSet:
    """Open the training or test images of a configuration, on this rank alone.

    Raises
    ------
    DataError
        If they are missing or damaged.
    """
    if config.source == "builtin":
        return Hdf5DataSet(Path(str(resources.files("hpcnn.data") / "builtin" / f"fashion-mini-{split}.h5")))
    if config.source == "synthetic":
        count = config.num_samples if split == "train" else max(1, config.num_samples // TEST_SHARE)
        return SyntheticDataSet(config.image_shape, config.num_classes, count, split)
    source = Path(config.source)
    if source.is_dir():
        path = source / f"{split}.h5"
        if not path.exists():
            raise DataError(
                f"data: folder '{source}' has no '{path.name}'; a source folder must hold train.h5 and test.h5."
                " Make them with `hpcnn data import`."
            )
        return Hdf5DataSet(path)
    if split == "test":
        if not config.test:
            raise DataError("data: no test images; data.source is one file. Name another by data.test.")
        return Hdf5DataSet(config.test)
    return Hdf5DataSet(source)
