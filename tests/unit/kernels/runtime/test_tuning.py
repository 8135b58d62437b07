"""The fastest of several kernels is measured once and remembered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcnn.ops.cuda import device, tuning


class Named:
    """A device that has a name."""

    architecture, num_processors = 90, 1

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def table(kernels: Path) -> Iterator[None]:
    """Tuning that has forgotten everything, on a device called A."""
    tuning.forget()
    with device.use(Named("GPU A")):
        yield
    tuning.forget()


def test_fastest_is_measured_once_and_then_read_by_all(table: None) -> None:
    seconds = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert tuning.fastest("k", list(seconds), seconds.__getitem__) == "b"
    assert tuning.fastest("k", list(seconds), _fail) == "b"
    tuning.forget()  # as another process
    assert tuning.fastest("k", list(seconds), _fail) == "b"
    assert tuning.export() == {"k": "b"}


def _fail(name: str) -> float:
    raise AssertionError(f"{name} is measured")


def test_choices_of_several_processes_are_merged(table: None) -> None:
    tuning.fastest("first", list("ab"), {"a": 1.0, "b": 2.0}.__getitem__)
    tuning.forget()
    tuning.fastest("second", list("ab"), {"a": 2.0, "b": 1.0}.__getitem__)
    tuning.forget()
    assert [tuning.fastest(key, list("ab"), _fail) for key in ("first", "second")] == ["a", "b"]


def test_other_gpus_other_kernels_and_unknown_choices_are_measured(table: None, kernels: Path) -> None:
    ascending, descending = {"a": 1.0, "b": 2.0}.__getitem__, {"a": 2.0, "b": 1.0}.__getitem__
    assert tuning.fastest("k", list("ab"), ascending) == "a"
    with device.use(Named("GPU B")):
        assert tuning.fastest("k", list("ab"), descending) == "b"
    assert tuning.fastest("k", list("bc"), {"b": 1.0, "c": 0.5}.__getitem__) == "c"
    tuning.forget()
    (kernels / "common.cuh").write_text("// changed\n")
    assert tuning.fastest("k", list("ab"), descending) == "b"


def test_nothing_is_measured_where_there_is_no_choice(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.fastest("k", ["a"], _fail) == "a"
    monkeypatch.setenv(tuning.VARIABLE, "off")
    assert tuning.fastest("k", list("ba"), _fail) == "b"
    assert tuning.export() == {}


def test_adopted_choices_precede_those_of_this_process(table: None) -> None:
    tuning.fastest("k", list("ab"), {"a": 1.0, "b": 2.0}.__getitem__)
    tuning.adopt({"k": "b", "other": "a"})
    assert tuning.fastest("k", list("ab"), _fail) == "b"
    assert tuning.export() == {"k": "b", "other": "a"}


@pytest.mark.parametrize("contents", [b"{", b"[]", b"\xff"])
def test_damaged_table_is_measured_again(contents: bytes, table: None, place: Path) -> None:
    ascending = {"a": 1.0, "b": 2.0}.__getitem__
    tuning.fastest("k", list("ab"), ascending)
    (file,) = place.glob("tuning-*.json")
    assert file.name.startswith("tuning-GPU-A-")
    whole = file.read_bytes()
    file.write_bytes(contents)
    tuning.forget()
    assert tuning.fastest("k", list("ab"), ascending) == "a"
    assert file.read_bytes() == whole
