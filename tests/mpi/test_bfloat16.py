"""Training in bfloat16 on CPUs: against float32, and on several ranks against one.

Each activation, and each gradient of one, is rounded to 8 bits, by at most 2^-8 of itself. These errors are independent
and add up over a dozen layers and three steps to about a percent of a loss or of the norm of a tensor. Ranks round the
same numbers at other places, so that their results differ from those of one rank by as much.
"""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.arrays import bfloat16
from hpcnn.nn import models
from hpcnn.ops import backend, onednn
from hpcnn.plan.planner import make_plan
from hpcnn.spec import ModelSpec
from tests.checks import spmd_assert
from tests.plans import Result, residual, train
from tests.worlds import alone, world

TOLERANCE = 3e-2
BATCH = 6
SPECS = {"lenet5": lambda: models.build("lenet5", (28, 28, 1), 10), "residual": residual}


@pytest.fixture(params=["numpy", "onednn"], autouse=True)
def _served(request):
    if request.param == "onednn" and not onednn.available():
        pytest.skip("the oneDNN library is not installed (pip install 'hpcnn[onednn]') or is switched off")
    with backend.use(request.param):
        yield


def assert_close(found: Result, expected: Result) -> None:
    spmd_assert(world().comm, np.allclose(found.losses, expected.losses, rtol=TOLERANCE))
    if world().rank == 0:
        for ours, theirs in ((found.tensors, expected.tensors), (found.statistics, expected.statistics)):
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert ours[name].dtype == np.float32
                error = np.linalg.norm(ours[name] - tensor)
                assert error <= TOLERANCE * max(np.linalg.norm(tensor), 0.1), name


def serial(spec: ModelSpec, **options) -> Result:
    return train(alone(), spec, make_plan(spec, "data", 1, BATCH), dtype=np.float32, **options)


@pytest.mark.parametrize("preset", ["data", "spatial"])
@pytest.mark.parametrize("name", SPECS)
def test_steps_agree_with_those_in_float32_on_one_rank(name, preset):
    spec = SPECS[name]()
    plan = make_plan(spec, preset, world().size, BATCH)
    found = train(world(), spec, plan, dtype=np.float32, activation=bfloat16())
    exact, rounded = serial(spec), serial(spec, activation=bfloat16())
    assert_close(found, exact)
    assert_close(found, rounded)
    assert any(np.any(rounded.tensors[key] != exact.tensors[key]) for key in exact.tensors)
