"""Seconds of passes: the roofline, and measured times in its proportion."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcnn.plan.machine import Machine, Rates, Timing
from hpcnn.plan.work import Clock, Passes, signature
from hpcnn.spec import AddSpec, BatchNormSpec, ConvSpec, FlattenSpec, LinearSpec, PoolSpec, ShortcutSpec

RATES = Rates(
    conv_forward_flops_per_s=1e9,
    conv_weight_gradient_flops_per_s=5e8,
    conv_input_gradient_flops_per_s=2e9,
    linear_flops_per_s=1e8,
    memory_bytes_per_s=1e8,
    call_s=1e-3,
)
CONV = ConvSpec(
    name="c", inputs=("input",), input_shape=(10, 12, 8), out_channels=4, kernel_size=(3, 3), padding=((1, 1), (1, 1))
)


def test_a_convolution_takes_as_long_as_its_arithmetic():
    found = Clock(Machine(rates=RATES)).passes(CONV, (2, 10, 12, 4), (2, 10, 12, 8))
    flops = 2 * 2 * 10 * 12 * 4 * 8 * 9
    assert found == pytest.approx(
        (1e-3 + flops / 1e9, 0.0, 1e-3 + flops / 5e8, 1e-3 + max(flops / 2e9, 4 * 3168 / 1e8))
    )


def test_a_fused_activation_is_undone_in_backward():
    plain = Clock(Machine(rates=RATES)).passes(CONV, (2, 10, 12, 4), (2, 10, 12, 8))
    fused = Clock(Machine(rates=RATES)).passes(replace(CONV, activation="relu"), (2, 10, 12, 4), (2, 10, 12, 8))
    assert fused == plain._replace(error=pytest.approx(1e-3 + 4 * 3 * 2 * 10 * 12 * 4 / 1e8))


def test_layers_that_compute_little_take_as_long_as_their_memory():
    clock, common = Clock(Machine(rates=RATES)), {"name": "x", "inputs": ("input",)}
    pool = PoolSpec(**common, input_shape=(8, 8, 3), kind="max", window=(2, 2), stride=(2, 2))
    assert clock.passes(pool, (1, 4, 4, 3), (1, 8, 8, 3)).forward == pytest.approx(1e-3 + 4 * 240 / 1e8)
    norm = BatchNormSpec(**common, input_shape=(8, 8, 3))
    assert clock.passes(norm, (1, 8, 8, 3), (1, 8, 8, 3)).input == pytest.approx(1e-3 + 4 * 6 * 192 / 1e8)
    assert Passes() == clock.passes(FlattenSpec(**common, input_shape=(8, 8, 3)), (1, 192), (1, 8, 8, 3))
    linear = LinearSpec(**common, input_shape=(100,), out_features=50)
    assert clock.passes(linear, (2, 50), (2, 100)).weight == pytest.approx(1e-3 + 4 * (100 + 200 + 5000) / 1e8)
    assert clock.passes(linear, (2000, 50), (2000, 100)).weight == pytest.approx(1e-3 + 2 * 2000 * 5000 / 1e8)


def test_nothing_takes_no_time():
    assert Passes() == Clock(Machine()).passes(CONV, (0, 0, 0, 0), (0, 0, 0, 0))


def test_what_was_measured_is_taken_as_it_is_and_others_in_the_roofline_s_proportion():
    seconds = (0.5, 0.25, 1.5, 0.75)
    conv = replace(CONV, activation="relu")
    timing = Timing(layer=signature(conv), extent=(2, 10, 12, 4, 8), seconds=seconds)
    clock = Clock(Machine(rates=replace(RATES, call_s=1e-12), timings=(timing,)))
    assert clock.passes(conv, (2, 10, 12, 4), (2, 10, 12, 8)) == pytest.approx(seconds)
    assert clock.passes(conv, (4, 10, 12, 4), (4, 10, 12, 8)).forward == pytest.approx(2 * 0.5, rel=0.01)
    other = replace(conv, stride=(2, 2))
    assert clock.passes(other, (2, 5, 6, 4), (2, 10, 12, 8)).forward < 0.1  # another kind of layer was not measured


def test_the_nearest_of_several_measurements_counts():
    timings = tuple(
        Timing(layer=signature(CONV), extent=(n, 10, 12, 4, 8), seconds=(seconds, 0.0, 0.0, 0.0))
        for n, seconds in ((1, 1.0), (16, 3.0))
    )
    clock = Clock(Machine(rates=replace(RATES, call_s=1e-12), timings=timings))
    assert clock.passes(CONV, (2, 10, 12, 4), (2, 10, 12, 8)).forward == pytest.approx(2.0, rel=0.01)
    assert clock.passes(CONV, (8, 10, 12, 4), (8, 10, 12, 8)).forward == pytest.approx(1.5, rel=0.01)


def test_a_shortcut_whose_channels_are_all_new_reads_nothing():
    layer = ShortcutSpec(name="x", inputs=("input",), input_shape=(8, 8, 4), stride=(2, 2), out_channels=8)
    timing = Timing(layer=signature(layer), extent=(2, 4, 4, 8, 4), seconds=(9.0, 0.0, 0.0, 9.0))
    bare, measured = Clock(Machine(rates=RATES)), Clock(Machine(rates=RATES, timings=(timing,)))
    assert measured.passes(layer, (2, 4, 4, 2), (2, 8, 8, 0)) == bare.passes(layer, (2, 4, 4, 2), (2, 8, 8, 0))


def test_signatures_tell_layers_apart_that_run_at_different_speeds():
    common = {"name": "x", "inputs": ("input",), "input_shape": (8, 8, 4)}
    layers = [
        CONV,
        replace(CONV, stride=(2, 1)),
        replace(CONV, dilation=(1, 2)),
        replace(CONV, groups=2),
        replace(CONV, activation="relu"),
        PoolSpec(**common, kind="max", window=(2, 2), stride=(2, 2)),
        PoolSpec(**common, kind="average", window=(2, 2), stride=(2, 2)),
        AddSpec(**common),
        AddSpec(**common, activation="relu"),
    ]
    assert len(layers) == len({signature(layer) for layer in layers})
