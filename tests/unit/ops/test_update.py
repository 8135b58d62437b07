import math
import os
from functools import partial

import numpy as np
import pytest

from hpcnn.errors import ShapeError
from hpcnn.ops import update

SIZES = [1, 7, 1001, update.BLOCK - 1, update.BLOCK, 2 * update.BLOCK + 3]


@pytest.fixture(autouse=True)
def two_threads():
    update.set_num_threads(2)
    yield
    update.set_num_threads(1)


def draw(size, count, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    arrays = [generator.standard_normal(size).astype(dtype) for _ in range(count)]
    if count > 3:
        arrays[3] = abs(arrays[3])
    return arrays


def assert_near(expected, actual):
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def sgd_formula(w, g, v, lr, momentum, weight_decay, nesterov, scale):
    w, g, v = (x.astype(np.float64) for x in (w, g, v))
    g = scale * g + weight_decay * w
    v = momentum * v + g
    return w - lr * (g + momentum * v if nesterov else v), v


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_sgd_follows_its_formula(size, nesterov, weight_decay, scale):
    w, g, v = draw(size, 3)
    expected = sgd_formula(w, g, v, 0.1, 0.9, weight_decay, nesterov, scale)
    before = g.copy()
    update.sgd_update(w, g, v, lr=0.1, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov, scale=scale)
    assert_near(expected[0], w)
    assert_near(expected[1], v)
    assert np.array_equal(before, g)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize(("scale", "step"), [(1.0, 0), (0.25, 9)])
def test_adam_follows_its_formula(size, decoupled, weight_decay, scale, step):
    arrays = draw(size, 4)
    w, g, m, v = (x.astype(np.float64) for x in arrays)
    if decoupled:
        w *= 1 - 0.01 * weight_decay
    g = scale * g + (0.0 if decoupled else weight_decay) * w
    m = 0.8 * m + 0.2 * g
    v = 0.9 * v + 0.1 * g * g
    w = w - 0.01 * (m / (1 - 0.8 ** (step + 1))) / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-3)
    before = arrays[1].copy()
    update.adam_update(
        *arrays,
        lr=0.01,
        beta1=0.8,
        beta2=0.9,
        epsilon=1e-3,
        weight_decay=weight_decay,
        decoupled=decoupled,
        step=step,
        scale=scale,
    )
    for expected, actual in zip((w, before, m, v), arrays, strict=True):
        assert_near(expected, actual)


@pytest.mark.parametrize("size", SIZES)
def test_lars_follows_its_formula(size):
    arrays = draw(size, 3)
    w, g, v = (x.astype(np.float64) for x in arrays)
    v = 0.9 * v + 0.07 * (0.5 * g + 0.02 * w)
    update.lars_update(*arrays, rate=0.07, momentum=0.9, weight_decay=0.02, scale=0.5)
    assert_near(v, arrays[2])
    assert_near(w - v, arrays[0])


def test_updates_of_float64_keep_their_precision():
    w, g, v = draw(1001, 3, np.float64)
    expected = sgd_formula(w, g, v, 0.1, 0.9, 0.03, True, 0.5)
    update.sgd_update(w, g, v, lr=0.1, momentum=0.9, weight_decay=0.03, nesterov=True, scale=0.5)
    np.testing.assert_allclose(w, expected[0], rtol=1e-13, atol=1e-13)


def test_lars_rate_is_the_trust_ratio_and_one_for_tensors_at_zero():
    rate = update.lars_rate(3.0, 4.0, trust_coefficient=0.001, weight_decay=0.5, epsilon=1e-8)
    assert rate == pytest.approx(0.001 * 3.0 / (4.0 + 0.5 * 3.0))
    assert update.lars_rate(0.0, 4.0, trust_coefficient=0.001, weight_decay=0.0, epsilon=0.0) == 1.0
    assert update.lars_rate(3.0, 0.0, trust_coefficient=0.001, weight_decay=0.0, epsilon=0.0) == 1.0


@pytest.mark.parametrize("size", [0, 1, 1001, update.NORM_BLOCK, 5 * update.NORM_BLOCK + 17])
def test_squared_norm_equals_the_exact_sum(size):
    (x,) = draw(size, 1)
    assert update.squared_norm(x) == pytest.approx(math.fsum(float(number) ** 2 for number in x), rel=1e-14, abs=0.0)


def test_squared_norms_are_those_of_the_slices():
    (x,) = draw(update.NORM_BLOCK + 50, 1)
    bounds = [(0, x.size), (3, 3), (1, 2), (17, update.NORM_BLOCK + 20)]
    assert update.squared_norms(x, bounds).tolist() == [update.squared_norm(x[start:stop]) for start, stop in bounds]
    assert update.squared_norms(x, []).shape == (0,)
    with pytest.raises(ShapeError, match="must be ranges within"):
        update.squared_norms(x, [(0, x.size + 1)])


def test_squared_norm_does_not_overflow_float32_and_shows_what_is_not_finite():
    assert update.squared_norm(np.full(10, 1e30, np.float32)) == pytest.approx(1e61, rel=1e-6)
    assert math.isnan(update.squared_norm(np.array([1.0, np.nan], np.float32)))


def test_no_bit_depends_on_the_number_of_threads():
    results = []
    for threads in (1, 2, 5):
        update.set_num_threads(threads)
        w, g, m, v = draw(7 * update.BLOCK + 13, 4, seed=3)
        norm = update.squared_norm(g)
        update.sgd_update(w, g, m, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True, scale=0.3)
        update.adam_update(w, g, m, v, lr=0.1, step=2, weight_decay=1e-4)
        results.append((norm, w.tobytes(), m.tobytes(), v.tobytes()))
    assert results[0] == results[1] == results[2]


def test_an_error_in_a_helper_thread_reaches_the_caller():
    def body(index, block):
        if index == 3:
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        update._for_blocks(body, 8, 1)


def test_arrays_that_do_not_belong_together_are_refused():
    w, g, v = draw(8, 3)
    with pytest.raises(ShapeError, match=r"sgd_update: sizes and types must agree; got 8 float32, 7 float32"):
        update.sgd_update(w, g[:7], v, lr=0.1)
    with pytest.raises(ShapeError, match=r"sgd_update: sizes and types must agree"):
        update.sgd_update(w, g.astype(np.float64), v, lr=0.1)
    with pytest.raises(ShapeError, match=r"squared_norm: arrays must be flat, contiguous"):
        update.squared_norm(w[::2])
    with pytest.raises(ShapeError, match=r"adam_update: arrays must be flat"):
        update.adam_update(w.reshape(2, 4), g, v, v, lr=0.1, step=0)


@pytest.mark.parametrize(("variable", "expected"), [("3", 3), ("4,2", 4), ("", None), ("many", None)])
def test_threads_are_as_many_as_openmp_has_or_as_the_process_has_cores(monkeypatch, variable, expected):
    monkeypatch.setattr(update, "_num_threads", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert update.num_threads() == (expected or len(os.sched_getaffinity(0)))


def test_a_thread_count_below_one_is_refused():
    with pytest.raises(ValueError, match=r"number of threads \(=0\) must be at least 1"):
        update.set_num_threads(0)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize(("begin", "end"), [(0, 40), (3, 29), (10, 15), (12, 14)])
def test_spared_ranges_are_updated_without_decay(rule, begin, end) -> None:
    bounds, random = [(0, 1), (7, 9), (10, 15), (39, 40)], np.random.default_rng(5)
    host = [abs(random.standard_normal(40)) for _ in range(3 if rule == "sgd" else 4)]
    run = update.sgd_update if rule == "sgd" else partial(update.adam_update, step=2)
    results = []
    for decay in (0.0, 0.3):
        results.append([x[begin:end].copy() for x in host])
        run(*results[-1], lr=0.1, weight_decay=decay)
    spared = np.array([any(start <= i < stop for start, stop in bounds) for i in range(begin, end)])
    actual = [x[begin:end].copy() for x in host]
    run(*actual, lr=0.1, weight_decay=0.3, spared=np.array(bounds), first=begin)
    for without, decayed, found in zip(*results, actual, strict=True):
        np.testing.assert_array_equal(np.where(spared, without, decayed), found)
