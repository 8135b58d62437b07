from __future__ import annotations

import pytest

from tests.run_folder import write_run


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run folder of a name; see `write_run`."""
    return lambda name="run", **options: write_run(tmp_path / name, **options)
