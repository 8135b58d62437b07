"""The HDF5 model file: global tensors by name, each with a checksum, written whole or not at all.

Layout: `/parameters/<layer>/<name>`, `/statistics/<layer>/<name>`, `/optimizer/<slot>/<layer>/<name>`, contiguous
float datasets in C order, filters as (K, R, S, C) and weights as (out, in), each with the attribute `crc32` (zlib.crc32
of its bytes, little endian); on the root the attributes of `_ATTRIBUTES` and `format`, `version`. Every HDF5 tool reads
it. The newer HDF5 format is asked for because it has checksums of its own on names, shapes and attributes: no flipped
byte goes unnoticed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hpcnn import bounded
from hpcnn.arrays import Array
from hpcnn.errors import CheckpointError
from hpcnn.nn.parameter import assign
from hpcnn.train.atomic import replacing

FORMAT = "hpcnn-model"
VERSION = 1

# Attribute on the root -> its type; all are fields of Checkpoint.
_ATTRIBUTES: dict[str, type] = {
    "model": str,
    "config": str,
    "data_fingerprint": str,
    "step": int,
    "epoch": int,
    "best_accuracy": float,
    "lazy_steps": int,
    "lr_scale": float,
    "average": str,
    "arithmetic": str,
}

_HEAD_BYTES = 65536

_LATER: dict[str, int | float | str] = {"lazy_steps": 0, "lr_scale": 1.0, "average": "", "arithmetic": ""}
"""What files of earlier versions lack."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a model file holds. Arrays are global tensors keyed by "<layer>/<name>"; no rank is in it.

    Whoever writes it on another thread passes copies: arrays must not change until `write` returns.
    """

    model: str
    """Name of the model."""
    parameters: Mapping[str, Array]
    statistics: Mapping[str, Array] = field(default_factory=dict)
    optimizer: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    """Slot ("velocity", ...) -> arrays shaped like the parameters."""
    config: str = ""
    """The resolved configuration as TOML."""
    step: int = 0
    """Updates made so far: the number of the next one."""
    epoch: int = 0
    """Epochs completed."""
    best_accuracy: float = 0.0
    """Best test accuracy so far."""
    lazy_steps: int = 0
    """Length of the next round of lazy updates; 0: there are none."""
    lr_scale: float = 1.0
    """What rollbacks have multiplied the learning rate by."""
    average: str = ""
    """State of the rule that averages replicas (`Rule.state`); the file holds their average."""
    arithmetic: str = ""
    """What a reproducible run computes with, in lines of "thing: what"; empty: it is not reproducible."""
    data_fingerprint: str = ""
    """Names the training data, so that a run does not go on with other data unnoticed."""
    path: Path | None = None
    """Where it was read from."""


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write a model file: to a temporary name beside `path`, synced, then renamed over it.

    A reader sees the old file or the new one, whatever happens in between. On one rank only.

    Raises
    ------
    CheckpointError
        If it cannot be written, as on a full disk; what stood at `path` is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_space(path.parent, checkpoint)
        with replacing(path) as temporary:
            _write_hdf5(temporary, checkpoint)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint: cannot write '{path}': {_reason(error)}. Earlier checkpoints are intact."
            " Free some space or set another --out."
        ) from None


def load(path: str | Path, *, parameters_only: bool = False) -> Checkpoint:
    """Read and verify a model file.

    Parameters
    ----------
    path : str or Path
        The file.
    parameters_only : bool
        Leave optimizer state and statistics out.

    Raises
    ------
    CheckpointError
        If the file is missing, not a model file, of a newer version, or damaged anywhere.
    """
    import h5py  # here and not above: only the rank that reads pays for it

    path = Path(path)
    with _refusals(path), h5py.File(path, "r", locking=False) as file:
        attributes = _read_attributes(file)
        groups: dict[str, dict[str, Array]] = {
            name: {} if parameters_only and name != "parameters" else dict(_read_group(file, name, path))
            for name in ("parameters", "statistics", "optimizer")
        }
    optimizer: dict[str, dict[str, Array]] = {}
    for name, array in groups["optimizer"].items():
        slot, _, rest = name.partition("/")
        optimizer.setdefault(slot, {})[rest] = array
    return Checkpoint(
        parameters=groups["parameters"],
        statistics=groups["statistics"],
        optimizer=optimizer,
        path=path,
        **attributes,
    )


def read_step(path: Path) -> int:
    """Return the step of a model file from its attributes alone; raises CheckpointError as `load` does."""
    import h5py

    with _refusals(path), h5py.File(path, "r", locking=False) as file:
        return int(_read_attributes(file)["step"])


def _require_space(folder: Path, checkpoint: Checkpoint) -> None:
    """Raise OSError if the disk has no room for the tensors, before the HDF5 library meets its end in mid-write."""
    groups = (checkpoint.parameters, checkpoint.statistics, *checkpoint.optimizer.values())
    # A kilobyte is more than the file has to say about a tensor.
    num_bytes = _HEAD_BYTES + sum(tensor.nbytes + 1024 for group in groups for tensor in group.values())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        reason = f"{num_bytes / 1e6:.1f} MB are needed and {free_bytes / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, reason)


def _write_hdf5(path: Path, checkpoint: Checkpoint) -> None:
    import h5py

    groups = {
        "parameters": checkpoint.parameters,
        "statistics": checkpoint.statistics,
        **{f"optimizer/{slot}": tensors for slot, tensors in checkpoint.optimizer.items()},
    }
    # The library makes the file without the numbers, which are written by hand: a disk that is full in the middle of it
    # is then an exception like any other, and no library in a state that ends in a crash.
    places: list[tuple[int, Array]] = []
    with h5py.File(path, "w", libver=("v110", "v110"), locking=False) as file:
        file.attrs["format"] = _text(FORMAT)
        file.attrs["version"] = VERSION
        for name, kind in _ATTRIBUTES.items():
            value = getattr(checkpoint, name)
            file.attrs[name] = _text(value) if kind is str else kind(value)
        for group in ("parameters", "statistics", "optimizer"):
            file.create_group(group)
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                dataset = _create(file, f"{group}/{name}", tensor)
                dataset.attrs["crc32"] = np.uint32(_crc32(_c_ordered(tensor)))
                if tensor.size:
                    places.append((dataset.id.get_offset(), tensor))
    with path.open("r+b") as raw:
        for offset, tensor in places:
            raw.seek(offset)
            raw.write(_c_ordered(tensor).reshape(-1).view(np.uint8).data)


def _create(file: Any, name: str, tensor: Array) -> Any:
    """Return a new dataset, contiguous, whose place in the file is taken and not yet written to.

    Neither it nor a group above it carries the time, which would make every file another.
    """
    import h5py

    *groups, short = name.split("/")
    place = file
    for group in groups:  # those that the library makes on the way have a time
        place = place.require_group(group)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    kind, space = h5py.h5t.py_create(tensor.dtype, logical=True), h5py.h5s.create_simple(tensor.shape)
    return h5py.Dataset(h5py.h5d.create(place.id, short.encode(), kind, space, creation))


def _c_ordered(tensor: Array) -> Array:
    """Return the tensor itself, or a copy where another order of its axes lies in memory."""
    if tensor.flags.c_contiguous:
        return tensor
    array = np.empty(tensor.shape, tensor.dtype)
    assign(array, tensor)
    return array


def _text(value: str) -> Any:
    """Return text as a fixed-length attribute: variable-length ones lie in a part of the file without checksums."""
    import h5py

    encoded = value.encode()
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(len(encoded), 1)))


def _read_attributes(file: Any) -> dict[str, Any]:
    """Return the attributes that are fields of Checkpoint, after a look at format and version."""
    if "format" not in file.attrs or _attribute(file, "format", str) != FORMAT:
        raise CheckpointError("it is an HDF5 file but not a model file of hpcnn: it lacks the attribute 'format'")
    version = _attribute(file, "version", int)
    if version != VERSION:
        raise CheckpointError(f"its version (={version}) must be {VERSION}; use the hpcnn that wrote it")
    return {
        name: _LATER[name] if name in _LATER and name not in file.attrs else _attribute(file, name, kind)
        for name, kind in _ATTRIBUTES.items()
    }


def _attribute(file: Any, name: str, kind: type) -> Any:
    """Return an attribute as plain Python text or number, none of which is negative."""
    value = bounded.attribute(file, name)
    if value is None or np.ndim(value):
        raise CheckpointError(f"it lacks the attribute '{name}'")
    if kind is str:
        return value.decode() if isinstance(value, bytes) else str(value)
    plain = kind(value)
    if not 0 <= plain < 1 << 62:
        raise CheckpointError(f"its attribute '{name}' (={plain}) must be at least 0")
    return plain


def _read_group(file: Any, group: str, path: Path) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) of every dataset below a group, verified."""
    import h5py

    found: list[tuple[str, Any]] = []
    if not isinstance(file.get(group, getlink=True), h5py.HardLink):
        raise CheckpointError(f"it lacks the group '{group}'")
    # Visits hard links only: no link leads out of the file.
    file[group].visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
    left = path.stat().st_size
    for name, dataset in found:
        array = _read_dataset(dataset, path)
        left -= array.nbytes
        if left < 0:  # many may claim the same ones
            raise CheckpointError(f"'{group}' claims more numbers than the file holds")
        yield name, array


def _read_dataset(dataset: Any, path: Path) -> Array:
    """Return a verified array. Its size is held against the file's before any memory is taken for it."""
    if dataset.dtype.kind != "f" or dataset.dtype.itemsize not in (4, 8) or dataset.dtype.byteorder == ">":
        raise CheckpointError(f"'{dataset.name}' has type {dataset.dtype}; it must be float32 or float64")
    num_bytes = dataset.dtype.itemsize * prod(dataset.shape)
    offset = dataset.id.get_offset()  # None: chunked, compressed, or in another file
    if num_bytes and (offset is None or offset + num_bytes > path.stat().st_size):
        raise CheckpointError(f"'{dataset.name}' must lie contiguous in the file, uncompressed, with all its numbers")
    array = np.empty(dataset.shape, dataset.dtype)
    if num_bytes:
        dataset.read_direct(array)
    if int(dataset.attrs["crc32"]) != _crc32(array):
        raise CheckpointError(f"the checksum of '{dataset.name}' does not match its numbers; they are damaged")
    return array


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data) if array.size else 0


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn everything that a damaged file can cause in the HDF5 library into CheckpointError."""
    try:
        bounded.require_regular(path)  # the HDF5 library would wait for a pipe
        yield
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint: '{path}' cannot be used: {error}.") from None
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: '{path}' does not exist. Name a model file (*.h5) of a run.") from None
    except Exception as error:  # h5py raises nearly every built-in type
        raise CheckpointError(
            f"checkpoint: '{path}' is damaged or not an HDF5 file ({_reason(error)}). Use an earlier checkpoint."
        ) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    text = " ".join(str(error).split())
    system = re.search(r"error message = '([^']*)'", text)  # what HDF5 buries in its own report
    return system[1] if system else text or type(error).__name__
