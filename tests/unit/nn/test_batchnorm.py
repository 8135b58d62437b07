"""Batch norm: running statistics by the formula, and a batch that is split over several holders."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hpcnn.nn.build import build
from hpcnn.nn.parameter import ParameterSet
from hpcnn.spec import BatchNormSpec
from tests.serial import context

SHAPE = (4, 3, 5)
PARTS = (1, 4, 2)  # samples of each holder


class SumOver:
    """Stands in for an all-reduce: sums the arrays that `holders` threads bring, in place."""

    def __init__(self, holders: int) -> None:
        self.calls = 0
        self._barrier = threading.Barrier(holders)
        self._arrays: dict[int, np.ndarray] = {}

    def bind(self, holder: int):
        def reduce_sum(array: np.ndarray) -> None:
            assert np.float64 == array.dtype
            self._arrays[holder] = array.copy()
            self._barrier.wait(10)
            array[...] = sum(self._arrays[other] for other in sorted(self._arrays))
            self._barrier.wait(10)
            self.calls += holder == 0

        return reduce_sum


def make(dtype=np.float64, **fields):
    spec = BatchNormSpec(name="norm", inputs=("input",), input_shape=SHAPE, **fields)
    parameters = ParameterSet([("norm/gamma", SHAPE[-1:], False), ("norm/beta", SHAPE[-1:], False)], dtype)
    parameters.values[:] = np.random.default_rng(3).normal(size=parameters.values.size) + 1
    return build(spec, parameters), parameters


def batch(samples: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(samples, *SHAPE)) * random.uniform(0.5, 3, SHAPE[-1]) + random.normal(size=SHAPE[-1])


def run(layer, parameters, x, grad_output, step):
    """Return output, input gradient, parameter gradients and running statistics after one training step."""
    output, saved = layer.forward((x,), step)
    error = layer.error(grad_output, saved, step)
    layer.backward_weight(error, saved, step)
    (grad_input,) = layer.backward_input(error, saved, step)
    return output, grad_input, parameters.grads.copy(), layer.statistics


def run_split(parts, x, grad_output, **fields):
    """Return what `run` returns for each part of the batch, the parts running as threads that sum together."""
    together = SumOver(len(parts))
    starts = np.cumsum((0, *parts))

    def part(holder: int):
        own = slice(starts[holder], starts[holder + 1])
        step = context(
            parts[holder],
            samples=np.arange(len(x))[own],
            global_batch=len(x),
            reduce_sum=together.bind(holder),
        )
        return run(*make(**fields), x[own], grad_output[own], step)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(part, range(len(parts)))), together


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_batch_in_uneven_parts_equals_the_whole_batch(activation) -> None:
    x, grad_output = batch(sum(PARTS)), batch(sum(PARTS), seed=1)
    parts, together = run_split(PARTS, x, grad_output, activation=activation)
    output, grad_input, grads, statistics = run(*make(activation=activation), x, grad_output, context(len(x)))
    np.testing.assert_allclose(np.concatenate([part[0] for part in parts]), output, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), grad_input, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(sum(part[2] for part in parts), grads, rtol=1e-10, atol=1e-12)
    for part in parts:
        for name, expected in statistics.items():
            np.testing.assert_allclose(part[3][name], expected, rtol=1e-12)
            np.testing.assert_array_equal(parts[0][3][name], part[3][name])  # the same bits on all ranks
    assert together.calls == 2  # one sum forward, one backward


def test_float32_parts_far_from_zero_equal_the_whole_batch() -> None:
    x = (batch(sum(PARTS)) + 1000).astype(np.float32)
    parts, _ = run_split(PARTS, x, x, dtype=np.float32)
    output, _, _, statistics = run(*make(np.float32), x, x, context(len(x)))
    np.testing.assert_allclose(np.concatenate([part[0] for part in parts]), output, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(parts[0][3]["running_var"], statistics["running_var"], rtol=1e-5)
    exact = 0.9 + 0.1 * x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(parts[0][3]["running_var"], exact, rtol=1e-5)


def test_without_a_sum_over_holders_the_statistics_are_local() -> None:
    x = batch(7)
    layer, parameters = make()
    output, _, _, _ = run(layer, parameters, x[:3], x[:3], context(3, global_batch=7))
    gamma, beta = parameters["norm/gamma"].value, parameters["norm/beta"].value
    expected = (x[:3] - x[:3].mean((0, 1, 2))) / np.sqrt(x[:3].var((0, 1, 2)) + 1e-5) * gamma + beta
    np.testing.assert_allclose(output, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, 0.25])
def test_running_statistics_follow_mean_and_unbiased_variance(momentum) -> None:
    layer, parameters = make(momentum=momentum)
    mean, var = np.zeros(SHAPE[-1]), np.ones(SHAPE[-1])
    for step in range(3):
        x = batch(2 + step, seed=step)
        run(layer, parameters, x, x, context(len(x), step=step))
        mean = (1 - momentum) * mean + momentum * x.mean((0, 1, 2))
        var = (1 - momentum) * var + momentum * x.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(layer.statistics["running_mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(layer.statistics["running_var"], var, rtol=1e-12)


def test_evaluation_uses_running_statistics_and_leaves_them() -> None:
    layer, parameters = make(activation="relu")
    layer.statistics["running_mean"][:] = np.arange(5)
    layer.statistics["running_var"][:] = np.arange(5) + 0.5
    x = batch(2)
    output, _ = layer.forward((x,), context(2, training=False))
    gamma, beta = parameters["norm/gamma"].value, parameters["norm/beta"].value
    expected = np.maximum((x - np.arange(5)) / np.sqrt(np.arange(5) + 0.5 + 1e-5) * gamma + beta, 0)
    np.testing.assert_allclose(output, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(np.arange(5), layer.statistics["running_mean"])


def test_evaluation_sends_no_messages() -> None:
    def refuse(array):
        raise AssertionError("evaluation must not sum over holders")

    layer, _ = make()
    layer.forward((batch(2),), context(2, training=False, reduce_sum=refuse))


def test_one_position_has_no_spread_and_stays_finite() -> None:
    spec = BatchNormSpec(name="norm", inputs=("input",), input_shape=(5,))
    layer = build(spec, ParameterSet([("norm/gamma", (5,), False), ("norm/beta", (5,), False)], np.float64))
    output, _ = layer.forward((np.ones((1, 5)),), context(1))
    assert np.isfinite(output).all()
    np.testing.assert_allclose(layer.statistics["running_var"], 0.9)
