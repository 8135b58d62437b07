"""From `data.source` to a data set."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from hpcnn.config import DataConfig
from hpcnn.data.dataset import DataSet
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
        return _open_file(Path(str(resources.files("hpcnn.data") / "builtin" / f"fashion-mini-{split}.h5")))
    if config.source == "synthetic":
        count = config.num_samples if split == "train" else max(1, config.num_samples // TEST_SHARE)
        return SyntheticDataSet(config.image_shape, config.num_classes, count, split)
    source = Path(config.source)
    if source.is_dir() and not (split == "test" and config.test):
        path = source / f"{split}.h5"
        if not path.exists():
            raise DataError(
                f"data: folder '{source}' has no '{path.name}'; a source folder must hold train.h5 and test.h5."
                " Make them with `hpcnn data import`."
            )
        return _open_file(path)
    if split == "test":
        if not config.test:
            raise DataError(f"data: '{source}' is one file and comes without test images. Name theirs by data.test.")
        return _open_file(Path(config.test))
    return _open_file(source)


def has_test_images(config: DataConfig) -> bool:
    """Return whether `open_data` has a test set to open: a single file comes without, unless another is named."""
    return bool(config.test) or config.source in ("builtin", "synthetic") or Path(config.source).is_dir()


def check_alike(train: DataSet, test: DataSet) -> None:
    """Raise DataError unless a network trained on one set can be measured on the other."""
    for name, ours, theirs in (
        ("images", train.image_shape, test.image_shape),
        ("classes", train.num_classes, test.num_classes),
    ):
        if ours != theirs:
            raise DataError(
                f"data: the training set has {name} (={ours}) and the test set (={theirs}); both must be of one kind."
                " Import both together with `hpcnn data import`, or mend data.source and data.test."
            )


def _open_file(path: Path) -> DataSet:
    from hpcnn.data.hdf5 import Hdf5DataSet  # loads the HDF5 library, which synthetic images do without

    return Hdf5DataSet(path)
