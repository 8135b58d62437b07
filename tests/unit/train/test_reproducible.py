"""What a reproducible run remembers of the machine, and when it may go on elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcnn.errors import CheckpointError
from hpcnn.train import reproducible
from hpcnn.train.reproducible import arithmetic, compare


def test_it_names_what_bits_depend_on(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast 9000\n\nmodel name\t: Fast 9000\n")
    assert reproducible.processor(tmp_path / "cpuinfo") == "Fast 9000"
    assert reproducible.processor(tmp_path / "nothing") == "unknown"
    names = [line.partition(": ")[0] for line in arithmetic(8, 2).splitlines()]
    assert names == ["virtual shards", "threads of a rank", "processor", "operators", "NumPy"]
    assert "/" not in next(line for line in arithmetic(8, 2).splitlines() if line.startswith("operators"))


def test_a_run_goes_on_with_as_many_shards_and_threads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = arithmetic(8, 2)
    assert compare(now, now, "it") == ""
    assert compare(now, "", "it") == ""
    for other, words in ((arithmetic(16, 2), "virtual shards 16 then, 8 now"), (arithmetic(8, 1), "a rank 1 then, 2")):
        with pytest.raises(CheckpointError, match=words):
            compare(other, now, "it")
    assert "without train.reproducible" in compare("", now, "it")
    monkeypatch.setattr(reproducible, "processor", lambda: "another")
    assert "processor another then" in compare(arithmetic(8, 2), now, "it")
