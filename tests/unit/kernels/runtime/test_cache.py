"""The cache: whole files, spare folders, and locks that end with their owner."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from hpcnn.ops.cuda import cache


def test_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.folders()[0] == Path("/a")
    monkeypatch.delenv(cache.VARIABLE)
    assert cache.folders()[0] == Path("/b/hpcnn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache.folders()[0] == Path("/c/.cache/hpcnn")


def test_cache_returns_what_was_written_and_leaves_nothing_else(place: Path) -> None:
    assert cache.read("x") is None
    assert cache.write("x", b"1") == place / "x"
    assert cache.write("x", b"2") == place / "x"
    assert cache.read("x") == b"2"
    assert [path.name for path in place.iterdir()] == ["x"]


def test_spare_folder_takes_over_where_the_cache_cannot_be_written(place: Path) -> None:
    place.write_text("a file where the folder should be")
    written = cache.write("x", b"1")
    assert written is not None
    assert written.parent.name == f"hpcnn-{os.getuid()}"
    assert cache.read("x") == b"1"
    with cache.lock("x") as held:
        assert held


def test_spare_folder_that_others_can_write_is_not_trusted(place: Path) -> None:
    place.write_text("a file where the folder should be")
    written = cache.write("x", b"1")
    assert written is not None
    written.parent.chmod(0o777)
    assert cache.read("x") is None
    assert cache.write("y", b"1") is None


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "file"])
def test_lock_is_held_by_one_and_given_back(flock: bool, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flock:
        monkeypatch.setattr("fcntl.flock", _not_supported)
    with cache.lock("x") as first, cache.lock("x", timeout_s=0.1) as second, cache.lock("y", timeout_s=0.1) as other:
        assert (first, second, other) == (True, False, True)
    with cache.lock("x", timeout_s=0.1) as again:
        assert again


def _not_supported(descriptor: int, operation: int) -> None:
    raise OSError(38, "Function not implemented")


def test_lock_by_file_of_a_dead_owner_is_broken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", _not_supported)
    place.mkdir()
    owner = place / "x.owner"
    owner.touch()
    long_ago = time.time() - 2 * cache.LOCK_TIMEOUT_S
    os.utime(owner, (long_ago, long_ago))
    with cache.lock("x", timeout_s=0.1) as held:
        assert held
    assert not owner.exists()


def test_lock_of_a_process_that_dies_is_free(place: Path) -> None:
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_die_with_lock)
    child.start()
    child.join(20)
    assert child.exitcode == 3
    with cache.lock("x", timeout_s=0.1) as held:
        assert held


def _die_with_lock() -> None:
    with cache.lock("x") as held:
        os._exit(3 if held else 4)
