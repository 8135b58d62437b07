"""What tests of several ranks share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worlds import world


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield one new folder, known to all ranks."""
    path = Path(world().broadcast_obj(tempfile.mkdtemp(prefix="hpcnn-test-") if world().rank == 0 else None))
    yield path
    world().barrier()
    if world().rank == 0:
        shutil.rmtree(path)
