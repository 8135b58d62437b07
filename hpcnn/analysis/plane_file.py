"""The record of an information plane: the group /information_plane of `analysis.h5` in the run folder.

    step, seconds                               when, and how long the training waited for it
    layers, in_chain, samples                   names, whether nothing leads round them, indices of the images
    S, I_x, I_y, sigma, kernel_mean             (steps, layers): entropy, what it shares with images and labels, mean
                                                width, mean of the kernel matrix off its diagonal
    saturation                                  I_x / log2 N
    forward_violated                            (steps, layers - 1): I_x grew from one layer to the next
    errors/S, errors/sigma, errors/kernel_mean  the same of the gradients of the layers' outputs
    errors/I_top                                (steps, layers - 1): what they share with that of the last layer
    errors/backward_violated                    (steps, layers - 2): that grew from one layer to the one below
    maps/step                                   when maps were measured
    maps/LAYER/...                              `chain.MapGroups`, and the quantities of `plane.py`

Attributes are the settings of [analysis], the entropies of images and labels, and the form of the kernel. Information
is in bits. The file is replaced as a whole, so that a run which is killed leaves a good one.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from hpcnn import bounded
from hpcnn.analysis import plane
from hpcnn.analysis.chain import MapGroups
from hpcnn.config import AnalysisConfig
from hpcnn.errors import ConfigError, DataError
from hpcnn.train.atomic import replacing

FILE, GROUP = "analysis.h5", "information_plane"
LARGEST_BYTES = 1 << 30
KERNEL = "exp(-d^2 / (2 sigma^2))"
Values: TypeAlias = dict[str, np.ndarray]
"""One measurement, by name: what ranks found, zero where another did."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all measurements of a run have in common."""

    config: AnalysisConfig
    layers: tuple[str, ...]
    chain: tuple[bool, ...]
    samples: np.ndarray
    S_input: float
    S_labels: float
    groups: dict[str, MapGroups]

    def attributes(self) -> dict[str, Any]:
        """Return them by name, as HDF5 keeps them."""
        config = {name: value for name, value in dataclasses.asdict(self.config).items() if name != "layers"}
        return config | {"kernel_form": KERNEL, "S_input": self.S_input, "S_labels": self.S_labels}


class PlaneFile:
    """What rank 0 has of a run's measurements.

    Parameters
    ----------
    folder : Path
        The run's.
    setting : Setting
    step : int
        Measurements up to this one are kept, of a run that goes on; 0: none.

    Raises
    ------
    ConfigError
        If those were made with other settings.
    """

    def __init__(self, folder: Path, setting: Setting, step: int) -> None:
        self._path, self._setting = Path(folder) / FILE, setting
        self._rows: list[Values] = []
        self._maps: list[Values] = []
        if step and self._path.exists():
            self._keep(step)

    @property
    def num_measured(self) -> int:
        """Number of measurements."""
        return len(self._rows)

    def last_widths(self) -> np.ndarray | None:
        """Return the widths of the last measurement, of outputs and of errors, shape (2, layers)."""
        if not self._rows:
            return None
        last = self._rows[-1]
        return np.array([last["sigma"], last.get("errors/sigma", np.zeros_like(last["sigma"]))])

    def add(self, step: int, seconds: float, values: Values) -> None:
        """Take note of one measurement, as all ranks together have found it."""
        setting, at = self._setting, {"step": np.array(step)}
        of_layers = plane.of_layers(values, setting.S_input, setting.S_labels)
        of_layers["saturation"] = of_layers["I_x"] / np.log2(len(setting.samples))
        self._rows.append(at | {"seconds": np.array(seconds)} | of_layers)
        of_maps: Values = {}
        for layer, groups in setting.groups.items():
            if f"maps/{layer}/S" in values:
                S, S_x = values[f"maps/{layer}/S"], values[f"maps/{layer}/S_x"]
                quantities = plane.of_maps(groups, S, S_x, setting.S_input)
                of_maps |= {f"{layer}/{name}": one for name, one in quantities.items()}
        if of_maps:
            self._maps.append(at | of_maps)

    def write(self) -> None:
        """Replace the file by one with all measurements; what others keep in it stays.

        Raises
        ------
        DataError
            If it cannot be written.
        """
        import h5py  # on rank 0 only

        try:
            with replacing(self._path) as temporary:
                if self._path.exists():
                    shutil.copyfile(self._path, temporary)
                with h5py.File(temporary, "a") as file:
                    if GROUP in file:
                        del file[GROUP]
                    self._fill(file.create_group(GROUP))
        except OSError as error:
            raise DataError(
                f"analysis: cannot write '{self._path}': {error}; checkpoints written so far are intact. Free some"
                " space and go on with --resume."
            ) from None

    def _fill(self, group: Any) -> None:
        setting = self._setting
        group.attrs.update(setting.attributes())
        group["layers"], group["in_chain"], group["samples"] = list(setting.layers), setting.chain, setting.samples
        for name in self._rows[0] if self._rows else ():
            group[name] = np.stack([row[name] for row in self._rows])
        for name in self._maps[0] if self._maps else ():
            group[f"maps/{name}"] = np.stack([row[name] for row in self._maps])
        for layer, groups in setting.groups.items() if self._maps else ():
            for name, value in dataclasses.asdict(groups).items():
                group[f"maps/{layer}/{name}"] = np.array(value)

    def _keep(self, step: int) -> None:
        """Read what was measured up to `step`."""
        old = read(self._path)
        if old is None:
            return
        ours = self._setting.attributes()
        differ = [name for name, value in ours.items() if not _equal(old.attributes.get(name), value)]
        if old.layers != self._setting.layers:
            differ.append("layers")
        if differ:
            raise ConfigError(
                f"config: '{self._path}' was measured with another 'analysis.{differ[0]}'"
                f" (={old.attributes.get(differ[0], old.layers)}); a run keeps its settings of [analysis]. Set it back,"
                " or move the file away."
            )
        fixed = {f"maps/{layer}/{field.name}" for layer in old.layers for field in dataclasses.fields(MapGroups)}
        for prefix, rows in (("", self._rows), ("maps/", self._maps)):
            columns = {
                name.removeprefix(prefix): column
                for name, column in old.columns.items()
                if name.startswith("maps/") == bool(prefix) and name not in fixed
            }
            for index, at in enumerate(columns.get("step", ())):
                if at <= step:
                    rows.append({name: column[index] for name, column in columns.items()})


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A record, read back."""

    attributes: dict[str, Any]
    layers: tuple[str, ...]
    chain: tuple[bool, ...]
    columns: Values
    """By name; the first axis is that of measurements."""


def read(path: Path) -> Plane | None:
    """Return the record in an analysis file, None where it has no information plane.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    import h5py

    try:
        bounded.require_regular(path)
        with h5py.File(path, "r") as file:
            if GROUP not in file:
                return None
            group = file[GROUP]
            # Hard links only, which do not lead out of the file.
            names: list[str] = []
            group.visititems(lambda name, one: names.append(name) if isinstance(one, h5py.Dataset) else None)
            if sum(group[name].size * group[name].dtype.itemsize for name in names) > LARGEST_BYTES:
                raise OSError(f"it claims more than {LARGEST_BYTES} bytes")
            layers = tuple(name.decode() for name in group["layers"][()])
            chain = tuple(map(bool, group["in_chain"][()]))
            columns = {name: group[name][()] for name in names if name not in ("layers", "in_chain", "samples")}
            attributes = {name: bounded.attribute(group, name) for name in group.attrs}
    except Exception as error:  # damaged files make h5py raise nearly every built-in type
        raise DataError(f"analysis: cannot read '{path}': {error}. Move it away, or repeat the run.") from None
    return Plane(attributes=attributes, layers=layers, chain=chain, columns=columns)


def _equal(old: Any, new: Any) -> bool:
    if isinstance(new, float):
        return old is not None and bool(np.isclose(old, new, rtol=1e-9))
    return bool(np.all(old == new))
