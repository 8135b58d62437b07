"""One fixture runs a test on each implementation of float32 arrays."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.ops import backend


@pytest.fixture(params=["numpy", "onednn"])
def implementation(request):
    """Serve float32 arrays by one implementation after the other; its name."""
    if request.param == "onednn":
        from hpcnn.ops import onednn

        if not onednn.available():
            pytest.skip("the oneDNN library is not installed (pip install 'hpcnn[onednn]') or is switched off")
    with backend.use(request.param):
        yield request.param


@pytest.fixture
def random():
    """A generator of reproducible numbers."""
    return np.random.default_rng(20)
