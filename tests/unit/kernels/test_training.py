"""Whole steps of training on the kernels, emulated or on a GPU, against the operators of the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hpcnn.arrays import Place
from hpcnn.nn import models
from hpcnn.ops import backend
from hpcnn.ops.cuda.types import bfloat16
from hpcnn.plan.planner import make_plan
from hpcnn.spec import ModelSpec
from tests.emulation.emulator import Emulator
from tests.plans import Result, residual, train
from tests.worlds import alone


def lenet5() -> ModelSpec:
    return models.build("lenet5", (28, 28, 1), 10)


# How far losses and the norm of each tensor may be off after three steps. Float32: other orders of sums. bf16: each
# activation and each gradient of one is rounded to 8 bits, by 2^-9, and these errors add up over the layers.
# Adam divides gradients by their own size, so that small ones, with their larger errors, move as far as large ones.
TOLERANCES = {("sgd", "fp32"): 2e-5, ("sgd", "bf16"): 3e-2, ("adam", "fp32"): 2e-5, ("adam", "bf16"): 1e-1}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(("make", "rule"), [(lenet5, "sgd"), (residual, "sgd"), (residual, "adam")])
def test_steps_of_training_agree_with_the_cpu(
    on_device, make: Callable[[], ModelSpec], rule: str, compute: str
) -> None:
    spec = make()
    place: Place = "cpu" if isinstance(on_device, Emulator) else "cuda"
    settings = (f"train.optimizer={rule}",) if rule == "sgd" else (f"train.optimizer={rule}", "train.epsilon=1e-2")
    activation = bfloat16() if compute == "bf16" else None

    def run(**options) -> Result:
        return train(alone(), spec, make_plan(spec, "data", 1, 4), *settings, dtype=np.float32, **options)

    found = run(activation=activation, place=place)
    with backend.use("numpy"):
        expected = run()
    tolerance = TOLERANCES[rule, compute]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=tolerance)
    for ours, theirs in ((found.tensors, expected.tensors), (found.statistics, expected.statistics)):
        for name, tensor in theirs.items():
            assert ours[name].dtype == np.float32
            error = np.linalg.norm(ours[name] - tensor)
            assert error <= tolerance * max(np.linalg.norm(tensor), 0.1), name
