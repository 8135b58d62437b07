"""Foreign formats -> HDF5 image files: IDX, CIFAR binary, and trees of image files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

from hpcnn.data.importers import cifar, idx
from hpcnn.data.importers.collection import Collection
from hpcnn.data.importers.folder import FolderCollection, read_names
from hpcnn.data.importers.team import Alone, Team, together
from hpcnn.data.importers.write import Statistics, Written, write
from hpcnn.errors import DataError

__all__ = ["KINDS", "Alone", "Kind", "Team", "Written", "import_data", "write_splits"]

Kind: TypeAlias = Literal["auto", "idx", "cifar", "folder"]
Progress: TypeAlias = Callable[[str, int], Callable[[int], None]]
KINDS: tuple[Kind, ...] = ("auto", "idx", "cifar", "folder")
TEST_FOLDERS = ("test", "val", "validation")


def import_data(
    source: Path,
    out: Path,
    *,
    kind: Kind = "auto",
    size: int | None = None,
    skip_broken: bool = False,
    seed: int = 1,
    team: Team | None = None,
    progress: Progress | None = None,
) -> list[Written]:
    """Make HDF5 image files of a data set in another format (collective).

    Parameters
    ----------
    source : Path
        Folder of IDX files, CIFAR binary as a folder or archive, or a tree of image files with one folder a class:
        `train/CLASS/*` and `test/CLASS/*` (or `val`), or the class folders themselves.
    out : Path
        Folder that gets train.h5 and test.h5; a name ending in .h5 where the source is a single split.
    size : int, optional
        Rows and columns to scale image files to.
    seed : int
        Key of the order of the rows of a tree. There neighbours would be of one class, so rows are shuffled once here,
        and blocks of consecutive rows are a fair sample ever after. IDX and CIFAR keep their order.
    progress : callable, optional
        Called as progress(split, images) and returns what to call with the number of rows just written.

    Returns
    -------
    list of Written
        One for each file, training images first. Both files carry mean and deviation of the training images.

    Raises
    ------
    DataError
        On all ranks, if the source is not understood or damaged, or the files cannot be written.
    """
    team = team or Alone()
    with together(team, f"reading '{source}'"):
        splits = load(source, kind, size)
        if out.suffix == ".h5" and len(splits) > 1:
            raise DataError(f"data: '{source}' has {' and '.join(splits)} images; --out must be a folder for both.")
    return write_splits(splits, out, team, seed=seed, skip_broken=skip_broken, progress=progress)


def write_splits(
    splits: dict[str, Collection],
    out: Path,
    team: Team,
    *,
    seed: int = 1,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> list[Written]:
    """Write collections by name of their split into `out` (collective); see `import_data`."""
    single = out.suffix == ".h5"
    with together(team, f"making '{out}'"):
        (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    written: list[Written] = []
    statistics: Statistics | None = None
    for name, collection in splits.items():
        report = progress(name, len(collection.labels)) if progress is not None else None
        path = out if single else out / f"{name}.h5"
        written.append(
            write(
                collection,
                path,
                team,
                seed=seed,
                skip_broken=skip_broken,
                statistics=statistics,
                progress=report,
            )
        )
        statistics = written[0].statistics
    return written


def load(source: Path, kind: Kind = "auto", size: int | None = None) -> dict[str, Collection]:
    """Return the splits of a source, training images first; raises DataError."""
    if not source.exists():
        raise DataError(f"data: '{source}' does not exist. `hpcnn data fetch` downloads well-known sets.")
    if kind == "auto":
        kind = _guess(source)
    if kind == "idx":
        return _load_idx(source)
    if kind == "cifar":
        return dict(cifar.load(source))
    return _load_tree(source, size)


def _guess(source: Path) -> Kind:
    if cifar.is_cifar(source):
        return "cifar"
    if not source.is_dir():
        raise DataError(
            f"data: cannot tell what '{source}' is; a source is a folder of IDX files, a CIFAR folder or tar.gz, or a"
            " tree of image files. Unpack other archives first."
        )
    return "idx" if idx.find(source, "train") or idx.find(source, "test") else "folder"


def _load_idx(source: Path) -> dict[str, Collection]:
    splits: dict[str, Collection] = {}
    for split in ("train", "test"):
        files = idx.find(source, split)
        if files is not None:
            splits[split] = idx.load(*files)
    if not splits:
        raise DataError(f"data: '{source}' has no train-images-idx3-ubyte[.gz] with its labels, nor t10k-*.")
    return splits


def _load_tree(source: Path, size: int | None) -> dict[str, Collection]:
    names = read_names(source)
    if not (source / "train").is_dir():
        return {"train": FolderCollection(source, size, names=names)}
    train = FolderCollection(source / "train", size, names=names)
    for folder in TEST_FOLDERS:
        if (source / folder).is_dir():
            test = FolderCollection(source / folder, size, classes=train.classes, names=names)
            if test.image_shape != train.image_shape:
                raise DataError(
                    f"data: images are {train.image_shape} under '{source / 'train'}' and {test.image_shape} under"
                    f" '{source / folder}'; they must be of one size. Add --size N to scale them."
                )
            return {"train": train, "test": test}
    return {"train": train}
