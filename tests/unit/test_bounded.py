"""What `bounded` refuses, and that nothing is waited for or taken meanwhile."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcnn import bounded, configuration
from hpcnn.config import Config
from hpcnn.errors import MOST_CHARACTERS, ConfigError, one_line
from hpcnn.nn import models
from hpcnn.plan import machine, planner


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(OSError, match="pipe or device"):
            bounded.text(path)
        with pytest.raises(ConfigError, match="cannot read"):
            configuration.load(path)
    with pytest.raises(IsADirectoryError):
        bounded.text(tmp_path)


def test_a_text_may_have_so_many_bytes_and_no_more(tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes(b"x" * 100)
    assert bounded.text(path, 100) == "x" * 100
    with pytest.raises(OSError, match="longer than 99 bytes"):
        bounded.text(path, 99)
    os.truncate(path, 1 << 40)  # takes no room on the disk, and none in memory
    with pytest.raises(OSError, match="longer than"):
        bounded.text(path)


HOSTILE = {
    "nested arrays": "x = " + "[" * 5000,
    "nested tables": "x = " + "{a=" * 5000,
    "a key of many parts": ".".join("a" * 100_000) + " = 1",
    "a header of many parts": "[" + ".".join("a" * 100_000) + "]",
    "many digits": "x = " + "9" * 5000,
    "many hexadecimal digits": "x = 0x" + "f" * 5000,
    "65 bits": "x = [[{y = 9223372036854775808}]]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_toml_that_takes_too_much_is_an_error_everywhere(text: str):
    with pytest.raises(ValueError):
        bounded.toml(text)
    with pytest.raises(ConfigError, match="is not valid TOML"):
        configuration.from_toml(text, "it")
    with pytest.raises(planner.PlanError, match="not a plan file"):
        planner.from_toml(text, models.build("lenet5", (28, 28, 1), 10), 8)
    with pytest.raises(machine.PlanError, match="is not valid TOML"):
        machine.from_toml(text)


def test_toml_of_64_bits_is_read():
    assert bounded.toml("a = 9223372036854775807\r\nb = -9223372036854775808\nc = [1.5, nan]")["a"] == 2**63 - 1


def test_nested_json_is_an_error():
    assert bounded.json_value('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested"):
        bounded.json_value("[" * 100_000)


@pytest.mark.parametrize("key", ["train.lr", "train.clip_norm", "exchange.timeout_seconds"])
def test_settings_are_finite(key: str):
    for value in ("nan", "inf"):
        with pytest.raises(ConfigError, match=rf"'{key}' \(={value}\)"):
            configuration.load("lenet5", [f"{key}={value}"])


@pytest.mark.parametrize("key", ["data.num_samples", "train.global_batch", "data.image_shape", "data.num_classes"])
def test_sizes_are_bounded(key: str):
    value = [2**40] * 3 if key == "data.image_shape" else 2**40
    with pytest.raises(ConfigError, match=f"'{key}"):
        configuration.load("lenet5", [f"{key}={value}"])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(["model", "data", "train", "plan", "exchange", "checkpoint", "log", "device"])
INNER = st.sampled_from(["name", "image_shape", "lr", "milestones", "seed", "turns", "kind", "steps", "source", "x"])


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS | st.text(max_size=5), st.dictionaries(INNER, VALUES, max_size=4) | VALUES, max_size=4))
def test_any_tree_is_a_configuration_or_one_error(tree):
    with suppress(ConfigError):
        assert isinstance(configuration.from_tree(tree), Config)


def test_attributes_that_claim_much_are_not_read(tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        file.attrs["small"] = np.arange(3)
        file.attrs["large"] = np.zeros(bounded.MOST_ATTRIBUTE_ITEMS + 1, np.uint8)
        assert bounded.attribute(file, "missing", 7) == 7
        assert bounded.attribute(file, "small").tolist() == [0, 1, 2]
        with pytest.raises(ValueError, match="claims to have"):
            bounded.attribute(file, "large")


def test_errors_are_one_line_that_commands_no_terminal():
    assert one_line("a\nb\x1b[2J\udc80é") == "a b�[2J�é"
    assert len(one_line("x" * 10**6)) < MOST_CHARACTERS + 10
