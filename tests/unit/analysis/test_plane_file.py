"""The record of an information plane, and the quantities in it."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcnn.analysis import plane
from hpcnn.analysis.chain import MapGroups
from hpcnn.analysis.plane_file import FILE, PlaneFile, Setting, Values, read
from hpcnn.config import AnalysisConfig
from hpcnn.errors import ConfigError, DataError

LAYERS = ("conv1", "fc1", "fc2")
GROUPS = MapGroups.of(channels=3, num_maps=3, num_pairs=2, seed=1)


def setting(**fields) -> Setting:
    return Setting(
        config=AnalysisConfig(samples=16, **fields),
        layers=LAYERS,
        chain=(True, True, True),
        samples=np.arange(16),
        S_input=3.0,
        S_labels=2.0,
        groups={"conv1": GROUPS},
    )


def values(shift: float = 0.0) -> Values:
    ones = np.ones(3)
    some = {"S": np.array([2.0, 1.5, 1.0]), "S_x": np.array([3.0, 3.2, 3.1]), "S_y": np.array([2.5, 2.4, 2.2])}
    errors = {
        "S": np.array([1.0, 1.5, 2.0]),
        "S_top": np.array([2.2, 2.5, 2.0]),
        "kernel_mean": ones,
        "sigma": 3 * ones,
    }
    groups = len(GROUPS.members(3))
    return (
        some
        | {"sigma": 2 * ones + shift, "kernel_mean": ones / 2}
        | {f"errors/{name}": one for name, one in errors.items()}
        | {"maps/conv1/S": np.full(groups, 1.0), "maps/conv1/S_x": np.full(groups, 3.5)}
    )


def test_quantities_of_layers() -> None:
    found = plane.of_layers(values(), S_input=3.0, S_labels=2.0)
    np.testing.assert_allclose(found["I_x"], [2.0, 1.3, 0.9])
    np.testing.assert_allclose(found["I_y"], [1.5, 1.1, 0.8])
    np.testing.assert_allclose(found["errors/I_top"], [2 + 1 - 2.2, 2 + 1.5 - 2.5])
    assert not found["forward_violated"].any()
    assert not found["errors/backward_violated"].any()


def test_quantities_of_maps() -> None:
    """Two copies of one bit and an independent one; the images tell all three."""
    bits = {0: "a", 1: "a", 2: "b"}
    S = np.array([len({bits[index] for index in np.flatnonzero(group)}) for group in GROUPS.members(3)], float)
    found = plane.of_maps(GROUPS, S, np.full(len(S), 4.0), S_input=4.0)
    for pair, trade, rest in zip(GROUPS.pairs, found["redundancy_synergy"], found["non_redundant"], strict=True):
        same = bits[pair[0]] == bits[pair[1]]
        assert (trade, rest) == ((1, 0) if same else (0, 2))
    np.testing.assert_array_equal(found["growing_I_x"], [1, 2])
    assert found["total_correlation"] == 1
    assert found["dual_total_correlation"] == 1  # 2 bits in all, of which only b is known by one map alone
    assert found["total_correlation_normalised"] == 0.5


def test_violations_are_counted_in_the_direction_that_is_asked() -> None:
    shared = np.array([[3.0, 2.0, 2.5], [3.0, 3.0 + 1e-9, 1.0]])
    assert plane.violations(shared) == (4, 1, 0.5)
    assert plane.violations(shared, grows=True) == (4, 2, pytest.approx(2.0))
    assert plane.violations(shared).share == 0.25
    assert plane.violations(np.ones((3, 1))).share == 0
    assert plane.violations(np.array([[np.nan, 1.0]])).checked == 0


def test_kernels_that_tell_nothing_are_warned_of() -> None:
    narrow, wide = plane.warnings(["a", "b", "c"], np.array([7.9, 0.01, 4.0]), np.array([0.01, 0.999, 0.5]), 8.0)
    assert narrow.startswith("a output")
    assert "too narrow" in narrow
    assert wide.startswith("b output")
    assert "too wide" in wide


def test_a_record_is_read_back_and_others_in_the_file_stay(tmp_path: Path) -> None:
    with h5py.File(tmp_path / FILE, "w") as file:
        file["other"] = 5
    record = PlaneFile(tmp_path, setting(), 0)
    for step in (0, 10):
        record.add(step, 0.5, values())
        record.write()
    found = read(tmp_path / FILE)
    assert found is not None
    assert (found.layers, found.chain) == (LAYERS, (True, True, True))
    assert found.attributes["alpha"] == 2.0
    assert found.attributes["kernel_form"] == "exp(-d^2 / (2 sigma^2))"
    assert found.columns["I_x"].shape == (2, 3)
    assert found.columns["maps/conv1/pair_I_x"].shape == (2, 2)
    np.testing.assert_allclose(found.columns["saturation"][0], found.columns["I_x"][0] / 4)
    with h5py.File(tmp_path / FILE) as file:
        assert file["other"][()] == 5
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_goes_on_forgets_what_came_later(tmp_path: Path) -> None:
    record = PlaneFile(tmp_path, setting(), 0)
    for step in (0, 10, 20):
        record.add(step, 0.5, values(step))
    record.write()
    again = PlaneFile(tmp_path, setting(), 12)
    assert again.num_measured == 2
    np.testing.assert_array_equal(again.last_widths(), [[12.0] * 3, [3.0] * 3])
    again.add(20, 0.5, values())
    again.write()
    found = read(tmp_path / FILE)
    assert found is not None
    assert found.columns["step"].tolist() == found.columns["maps/step"].tolist() == [0, 10, 20]
    assert PlaneFile(tmp_path, setting(), 0).num_measured == 0


def test_other_settings_are_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    record = PlaneFile(tmp_path, setting(), 0)
    record.add(0, 0.5, values())
    record.write()
    with pytest.raises(ConfigError, match=r"analysis\.width_scale"):
        PlaneFile(tmp_path, setting(width_scale=2.0), 5)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no HDF5")
    with pytest.raises(DataError, match=FILE):
        read(tmp_path / FILE)
