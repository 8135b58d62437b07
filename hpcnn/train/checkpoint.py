"""Checkpoints of a run: which files stay, which is the newest good one, and how one goes back into a model.

`<run>/checkpoints/step-00000123.h5` are the newest few; `<run>/best.h5` and `<run>/final.h5` are further names of such
files (hard links; copies where the file system has none). Only one rank writes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from hpcnn.arrays import Array, Shape
from hpcnn.errors import CheckpointError
from hpcnn.nn.parameter import ParameterSet, assign
from hpcnn.train.atomic import replacing
from hpcnn.train.model_file import Checkpoint, load, read_step, write

__all__ = [
    "Checkpoint",
    "Latest",
    "Store",
    "find",
    "latest",
    "load",
    "restore_into",
    "slots_of",
    "tensors_of",
    "to_resume",
]

FOLDER = "checkpoints"
BEST = "best.h5"
FINAL = "final.h5"
_STEP_FILE = re.compile(r"step-(\d+)\.h5")
_SHOWN_NAMES = 5


class Store:
    """Writes the checkpoints of one run folder and removes the old ones.

    Parameters
    ----------
    run_folder : Path
        The run's folder; made when missing. What a killed run left half written is removed.
    keep : int
        How many of the newest step files stay.

    Raises
    ------
    CheckpointError
        If the folder cannot be made or cleaned.
    """

    def __init__(self, run_folder: Path, keep: int) -> None:
        self.run_folder = Path(run_folder)
        self.keep = keep
        folder = self.run_folder / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for place in (self.run_folder, folder):
                for leftover in place.glob(".*.h5.*tmp"):
                    leftover.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint: cannot use '{folder}': {error.strerror}. Make it writable or set another --out."
            ) from None

    def save(self, checkpoint: Checkpoint, *, best: bool = False, final: bool = False) -> Path:
        """Write a checkpoint under its step's name, give it its other names, and drop the oldest.

        Parameters
        ----------
        checkpoint : Checkpoint
            What to write.
        best, final : bool
            Whether `best.h5` or `final.h5` shall be this one from now on.

        Raises
        ------
        CheckpointError
            If it cannot be written; all earlier checkpoints are intact then.
        """
        path = self.run_folder / FOLDER / f"step-{checkpoint.step:08d}.h5"
        write(path, checkpoint)
        try:
            for name, wanted in ((BEST, best), (FINAL, final)):
                if wanted:
                    _link(path, self.run_folder / name)
            # Files of later steps are not this history's: a damaged one that was fallen back from stays until passed.
            old = [file for step, file in _step_files(self.run_folder) if step <= checkpoint.step]
            for file in old[self.keep :]:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint: '{path}' is written, but {error.filename} cannot be updated: {error.strerror}."
                " Make the run folder writable."
            ) from None
        return path


class Latest(NamedTuple):
    """The newest checkpoint that verifies, and what was wrong with newer ones (empty: nothing)."""

    checkpoint: Checkpoint
    warning: str


def latest(run_folder: str | Path) -> Latest | None:
    """Return the newest good checkpoint of a run folder, or None where there are none at all.

    Raises
    ------
    CheckpointError
        If there are checkpoints and every one of them is damaged.
    """
    run_folder = Path(run_folder)
    candidates = [(step, path) for step, path in _step_files(run_folder)]
    refusals: list[str] = []
    for name in (FINAL, BEST):
        path = run_folder / name
        if path.exists():
            try:
                candidates.append((read_step(path), path))
            except CheckpointError as error:
                refusals.append(str(error))
    # Stable: of equal steps the step file comes first.
    for _, path in sorted(candidates, key=lambda candidate: -candidate[0]):
        try:
            return Latest(load(path), " ".join(refusals))
        except CheckpointError as error:
            refusals.append(str(error))
    if refusals:
        raise CheckpointError(
            f"checkpoint: none in '{run_folder}' can be used. {' '.join(refusals)} Start again without --resume."
        )
    return None


def to_resume(run_folder: str | Path, data_fingerprint: str) -> Latest | None:
    """Return the newest good checkpoint of a run that goes on with the data of this fingerprint, if there are any.

    Raises
    ------
    CheckpointError
        If all are damaged, or it was trained on other data.
    """
    found = latest(run_folder)
    if found is not None and found.checkpoint.data_fingerprint != data_fingerprint:
        raise CheckpointError(
            f"checkpoint: '{found.checkpoint.path}' was trained on other images (={found.checkpoint.data_fingerprint},"
            f" these are {data_fingerprint}); a resumed run needs the same data. Set data.source back, or start anew"
            " with --init."
        )
    return found


def find(path: str | Path) -> Checkpoint:
    """Return the checkpoint in a file, or the newest good one of a run folder.

    Raises
    ------
    CheckpointError
        If `path` is neither, or what is there is damaged.
    """
    path = Path(path)
    if path.is_file():
        return load(path)
    found = latest(path) if path.is_dir() else None
    if found is None:
        raise CheckpointError(f"checkpoint: '{path}' is neither a model file nor a run folder with checkpoints.")
    return found.checkpoint


def tensors_of(parameters: ParameterSet) -> dict[str, Array]:
    """Return the parameters by name, as views."""
    return {parameter.name: parameter.value for parameter in parameters.parameters}


def slots_of(state: Mapping[str, Array], parameters: ParameterSet) -> dict[str, dict[str, Array]]:
    """Return an optimizer's flat state by slot and parameter name, as views in the parameters' shapes."""
    return {
        slot: {parameter.name: parameters.view(flat, parameter.name) for parameter in parameters.parameters}
        for slot, flat in state.items()
    }


def restore_into(
    checkpoint: Checkpoint,
    *,
    model: str,
    parameters: ParameterSet,
    statistics: Mapping[str, Array] | None = None,
    optimizer: Mapping[str, Array] | None = None,
) -> None:
    """Copy a checkpoint into a model, in place; either all of it fits or nothing is changed.

    Parameters
    ----------
    checkpoint : Checkpoint
        From `load` or `latest`.
    model : str
        Name of this run's model, for the message.
    parameters : ParameterSet
        Receives the parameters.
    statistics : dict of str to Array, optional
        Receives the running statistics; left out: they are not restored.
    optimizer : dict of str to Array, shape (count,), optional
        `Optimizer.state`; left out: it is not restored.

    Raises
    ------
    CheckpointError
        If names or shapes differ; the message lists them and names both models.
    """
    pairs = _pairs(checkpoint.parameters, tensors_of(parameters), "")
    if statistics is not None:
        pairs += _pairs(checkpoint.statistics, statistics, "")
    if optimizer is not None:
        ours = slots_of(optimizer, parameters)
        for slot in dict.fromkeys([*ours, *checkpoint.optimizer]):
            pairs += _pairs(checkpoint.optimizer.get(slot, {}), ours.get(slot, {}), f"optimizer/{slot}/")
    missing = [name for name, source, _ in pairs if source is None]
    extra = [name for name, _, target in pairs if target is None]
    differ = [
        f"{name} {_shape(source.shape)} instead of {_shape(target.shape)}"
        for name, source, target in pairs
        if source is not None and target is not None and source.shape != target.shape
    ]
    if missing or extra or differ:
        lists = {"missing": missing, "not of this model": extra, "of another shape": differ}
        raise CheckpointError(
            f"checkpoint: {_origin(checkpoint)} is of '{checkpoint.model}', this run's model is '{model}', and they do"
            f" not fit: {'; '.join(f'{what}: {_some(names)}' for what, names in lists.items() if names)}."
            " Use a checkpoint of the same model, number of classes and optimizer."
        )
    for _, source, target in pairs:
        if target is not None:
            assign(target, source)


def _pairs(
    source: Mapping[str, Array], target: Mapping[str, Array], prefix: str
) -> list[tuple[str, Array | None, Array | None]]:
    names = dict.fromkeys([*target, *source])
    return [(f"{prefix}{name}", source.get(name), target.get(name)) for name in names]


def _step_files(run_folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of the step files, newest first."""
    found = [(_STEP_FILE.fullmatch(path.name), path) for path in (run_folder / FOLDER).glob("step-*.h5")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _link(source: Path, target: Path) -> None:
    """Make `target` another name of `source`, replacing what it named before in one step."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _origin(checkpoint: Checkpoint) -> str:
    return f"'{checkpoint.path}'" if checkpoint.path else "it"


def _shape(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
