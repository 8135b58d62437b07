"""Random numbers from counters: the same wherever they are drawn, and random enough."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn import rng


def splitmix64(state: int, count: int) -> list[int]:
    """Return the published generator's first outputs from a seed, in Python's own integers."""
    mask, outputs = (1 << 64) - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def test_bits_of_consecutive_counters_are_splitmix64():
    assert splitmix64(0, 1)[0] == 0xE220A8397B1DCDAF  # the published first number of seed 0
    for seed in (0, 1, 12345, (1 << 64) - 1):
        assert splitmix64(seed, 9) == rng.bits(seed, np.arange(9, dtype=np.uint64)).tolist()


def test_a_draw_does_not_depend_on_its_neighbours():
    index = np.arange(1000, dtype=np.uint64)
    whole, chosen = rng.bits(7, index), np.random.default_rng(0).permutation(1000)[:100]
    np.testing.assert_array_equal(whole[chosen], rng.bits(7, index[chosen]))


def test_keys_differ_by_seed_purpose_and_counter():
    keys = {
        rng.key(seed, purpose, *counters)
        for seed in (1, 2, 12)
        for purpose in ("dropout", "shuffle", "initialise:conv1")
        for counters in ((), (0,), (1,), (1, 2), (12,), (2, 1))
    }
    assert len(keys) == 3 * 3 * 6
    assert all(0 <= key < 1 << 64 for key in keys)


def test_keys_never_change_between_versions():
    # A run that is resumed by a later version must see the same masks and order.
    assert rng.key(1, "shuffle", 0) == 0x77AD43763DE61A07


def test_generators_of_one_purpose_agree():
    one, other = rng.generator(3, "crop", 1), rng.generator(3, "crop", 1)
    np.testing.assert_array_equal(one.standard_normal(10), other.standard_normal(10))
    assert not np.array_equal(rng.generator(3, "crop", 2).random(10), rng.generator(3, "crop", 1).random(10))


@pytest.mark.parametrize("stream", [0, 1, rng.key(1, "dropout")])
def test_uniform_numbers_are_spread_evenly_over_zero_to_one(stream):
    u = rng.uniform(stream, np.arange(100_000, dtype=np.uint64))
    assert u.dtype == np.float32
    assert u.min() >= 0.0
    assert u.max() < 1.0
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    chi_squared = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_squared < 49 + 5 * np.sqrt(2 * 49)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02


def test_the_largest_draw_is_still_below_one(monkeypatch):
    monkeypatch.setattr(rng, "bits", lambda stream, index: np.full(index.shape, (1 << 64) - 1, np.uint64))
    assert rng.uniform(0, np.zeros(1, np.uint64))[0] == 1 - 2.0**-24


def test_counters_hold_the_sample_above_and_the_element_below():
    counters = rng.sample_elements(np.array([0, 5, 2**32 - 1]), np.arange(10, 13))
    assert counters.dtype == np.uint64
    expected = [[(sample << 32) | element for element in (10, 11, 12)] for sample in (0, 5, 2**32 - 1)]
    assert expected == counters.tolist()


def test_inputs_stay_as_they_are():
    index = np.arange(5, dtype=np.uint64)
    rng.bits(1, index)
    rng.uniform(1, index)
    np.testing.assert_array_equal(np.arange(5), index)
