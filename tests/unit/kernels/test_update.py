"""Kernels of weight updates against their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpcnn.errors import ShapeError
from hpcnn.ops import update as public
from hpcnn.ops.cuda import update
from tests.mixed import draw, unaligned

# Fewer than a vector, no multiple of one, and more than the grid's threads hold at once.
SIZES = [1, 7, 1000, 33001]
PLACES = [lambda device, x: device.upload(x), unaligned]


def assert_near(expected, actual):
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def arrays(random, size, count):
    drawn = [draw(random, size) for _ in range(count)]
    if count > 3:
        drawn[3] = abs(drawn[3])
    return drawn


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("put", PLACES)
@pytest.mark.parametrize(("nesterov", "decay", "scale"), [(False, 0.0, 1.0), (True, 0.03, 0.25)])
def test_sgd_follows_its_formula(device, random, size, put, nesterov, decay, scale):
    host = arrays(random, size, 3)
    w, g, v = (x.astype(np.float64) for x in host)
    g = scale * g + decay * w
    v = 0.9 * v + g
    w = w - 0.1 * (g + 0.9 * v if nesterov else v)
    value, grad, velocity = (put(device, x) for x in host)
    update.sgd_update(value, grad, velocity, lr=0.1, momentum=0.9, weight_decay=decay, nesterov=nesterov, scale=scale)
    assert_near(w, device.download(value))
    assert_near(v, device.download(velocity))
    np.testing.assert_array_equal(host[1], device.download(grad))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("put", PLACES)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("decay", "scale", "step"), [(0.0, 1.0, 0), (0.03, 0.25, 9)])
def test_adam_follows_its_formula(device, random, size, put, decoupled, decay, scale, step):
    host = arrays(random, size, 4)
    w, g, m, v = (x.astype(np.float64) for x in host)
    if decoupled:
        w *= 1 - 0.01 * decay
    g = scale * g + (0.0 if decoupled else decay) * w
    m = 0.8 * m + 0.2 * g
    v = 0.9 * v + 0.1 * g * g
    w = w - 0.01 * (m / (1 - 0.8 ** (step + 1))) / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-3)
    options = {"lr": 0.01, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "weight_decay": decay}
    there = [put(device, x) for x in host]
    update.adam_update(*there, **options, decoupled=decoupled, step=step, scale=scale)
    for expected, actual in zip((w, host[1], m, v), there, strict=True):
        assert_near(expected, device.download(actual))


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(("begin", "end"), [(0, 4000), (4, 4000), (3, 2990), (1000, 1500), (1205, 1290)])
def test_spared_ranges_take_the_bits_of_an_update_without_decay(device, random, rule, begin, end):
    bounds = [(0, 1), (7, 9), (10, 12), (1000, 1500), (2048, 2112), (3999, 4000)]
    host = arrays(random, 4000, 3 if rule == "sgd" else 4)
    options = {"lr": 0.1, "momentum": 0.9} if rule == "sgd" else {"lr": 0.1, "step": 3, "decoupled": rule == "adamw"}
    run = update.sgd_update if rule == "sgd" else update.adam_update
    results = []
    for decay in (0.0, 0.3):
        there = [device.upload(x[begin:end]) for x in host]
        run(*there, weight_decay=decay, **options)
        results.append([device.download(x) for x in there])
    spared = np.zeros(4000, bool)
    for start, stop in bounds:
        spared[start:stop] = True
    there = [device.upload(x[begin:end]) for x in host]
    run(*there, weight_decay=0.3, spared=device.upload(np.array(bounds, np.int64)), first=begin, **options)
    for without, decayed, actual in zip(*results, there, strict=True):
        np.testing.assert_array_equal(np.where(spared[begin:end], without, decayed), device.download(actual))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("put", PLACES)
def test_lars_follows_its_formula(device, random, size, put):
    host = arrays(random, size, 3)
    w, g, v = (x.astype(np.float64) for x in host)
    v = 0.9 * v + 0.07 * (0.5 * g + 0.02 * w)
    value, grad, velocity = (put(device, x) for x in host)
    update.lars_update(value, grad, velocity, rate=0.07, momentum=0.9, weight_decay=0.02, scale=0.5)
    assert_near(v, device.download(velocity))
    assert_near(w - v, device.download(value))


def test_neighbours_of_a_slice_stay_as_they_are(device, random):
    host = arrays(random, 50, 3)
    value, grad, velocity = (device.upload(x) for x in host)
    update.sgd_update(value[3:40], grad[3:40], velocity[3:40], lr=0.1)
    changed = np.zeros(50, bool)
    changed[3:40] = True
    np.testing.assert_array_equal(changed, host[0] != device.download(value))
    np.testing.assert_array_equal(changed, host[2] != device.download(velocity))


@pytest.mark.parametrize("size", [0, 1, 3, 1001, 1500003])
def test_squared_norm_equals_the_exact_sum_wherever_the_array_begins(device, random, size):
    x = draw(random, size)
    norm = update.squared_norm(device.upload(x))
    assert isinstance(norm, float)
    assert norm == pytest.approx(math.fsum(float(number) ** 2 for number in x), rel=1e-14, abs=0.0)
    if size:
        assert norm == update.squared_norm(unaligned(device, x))


def test_squared_norms_are_those_of_the_slices(device, random):
    x = draw(random, 5000)
    bounds = [(0, 5000), (3, 3), (1, 2), (4, 1100), (7, 4999), (4096, 5000)]
    there = device.upload(x)
    norms = update.squared_norms(there, bounds)
    assert norms.dtype == np.float64
    assert norms.tolist() == [update.squared_norm(there[start:stop]) for start, stop in bounds]
    assert update.squared_norms(there, []).shape == (0,)


def test_squared_norm_does_not_overflow_float32_and_shows_what_is_not_finite(device):
    assert update.squared_norm(device.upload(np.full(10, 1e30, np.float32))) == pytest.approx(1e61, rel=1e-6)
    assert math.isnan(update.squared_norm(device.upload(np.array([1.0, np.nan], np.float32))))


def test_the_public_functions_come_here(on_device, random, monkeypatch):
    launched = []
    launch = on_device.launch

    def spy(source, kernel, *args, **options):
        launched.append(kernel)
        launch(source, kernel, *args, **options)

    monkeypatch.setattr(on_device, "launch", spy)
    w, g, m, v = (on_device.upload(x) for x in arrays(random, 64, 4))
    public.sgd_update(w, g, m, lr=0.1)
    public.adam_update(w, g, m, v, lr=0.1, step=0)
    public.lars_update(w, g, m, rate=0.1, momentum=0.9)
    assert public.squared_norm(w) > 0
    names = ["update_sgd_vector_f32", "update_adam_vector_f32", "update_lars_vector_f32", "update_squares_f32"]
    assert launched == [*names, "update_squares_total"]
    with pytest.raises(ShapeError, match="sizes and types must agree"):
        public.sgd_update(w, g[1:], m, lr=0.1)
