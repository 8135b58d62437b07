"""Elements as message bytes: every bit pattern, and rounding against exact arithmetic."""

from __future__ import annotations

import math
import struct
import threading
import warnings
from fractions import Fraction

import numpy as np
import pytest

from hpcnn.comm import wire as wires
from hpcnn.comm.wire import BLOCK, WIRES, pack, round_in_place, unpack_add, unpack_store, wire_itemsize
from hpcnn.errors import CommError

HALVED = ("bf16", "fp16")
ALL_PATTERNS = np.arange(1 << 16, dtype=np.uint16)
# Bits of precision, exponent of the smallest number above zero, and the first number too large.
FORMATS = {"bf16": (8, -133, Fraction(2) ** 128), "fp16": (11, -24, Fraction(2) ** 16)}


def packed(x: np.ndarray, wire: str, **options) -> tuple[np.ndarray, np.ndarray]:
    """Return the message of an array, and the array after packing."""
    source, message = x.copy(), np.full(x.size * wire_itemsize(wire, x.dtype), 0xAA, np.uint8)
    pack(source, message, wire, **options)
    return message, source


def stored(message: np.ndarray, count: int, wire: str, dtype=np.float32) -> np.ndarray:
    target = np.full(count, 77, dtype)
    unpack_store(message, target, wire)
    return target


def exact(pattern: int, wire: str) -> float:
    """Return the number that 16 bits stand for, by the standard library."""
    return struct.unpack("<f", struct.pack("<I", pattern << 16))[0] if wire == "bf16" else (
        struct.unpack("<e", struct.pack("<H", pattern))[0]
    )  # fmt: skip


def rounded(x: float, wire: str) -> float:
    """Return the nearest number of the format, ties to even, by exact fractions."""
    if x == 0 or math.isinf(x) or math.isnan(x):
        return x
    precision, smallest, too_large = FORMATS[wire]
    unit = Fraction(2) ** max(math.frexp(x)[1] - precision, smallest)
    nearest = round(Fraction(x) / unit) * unit  # Python rounds fractions to even
    return math.copysign(math.inf if abs(nearest) >= too_large else float(abs(nearest)), x)


def awkward_numbers() -> np.ndarray:
    """Return float32 numbers of every exponent, and all neighbourhoods in which rounding has to decide."""
    rng = np.random.default_rng(0)
    numbers = [rng.integers(0, 1 << 32, 20_000, dtype=np.uint32)]
    upper = rng.integers(0, 1 << 16, 2_000, dtype=np.uint32) << 16
    numbers += [upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]  # around ties of bf16
    upper = rng.integers(0, 1 << 19, 2_000, dtype=np.uint32) << 13
    numbers += [upper | low for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF)]  # and of fp16
    subnormal = (rng.integers(0, 2048, 2_000).astype(np.float32) * np.float32(2**-25)).view(np.uint32)
    numbers += [subnormal, subnormal + np.uint32(1), subnormal | np.uint32(1 << 31)]
    edges = np.array([65504, 65519.99, 65520, 65536, 3.4028235e38, 3.389e38, 3.39618e38, 1e-45, 0.0, -0.0], np.float32)
    return np.concatenate([*numbers, edges.view(np.uint32), (-edges).view(np.uint32)]).view(np.float32)


@pytest.mark.parametrize("wire", HALVED)
def test_every_pattern_of_16_bits_is_read_as_the_standard_says_and_travels_unchanged(wire):
    read = stored(ALL_PATTERNS.view(np.uint8), ALL_PATTERNS.size, wire)
    expected = [exact(int(pattern), wire) for pattern in ALL_PATTERNS]
    np.testing.assert_array_equal(np.array(expected, np.float32), read)
    np.testing.assert_array_equal(np.signbit(expected), np.signbit(read))
    message, source = packed(read, wire)
    is_nan = np.isnan(read)
    assert 0 < is_nan.sum() < 3000
    np.testing.assert_array_equal(ALL_PATTERNS[~is_nan], message.view(np.uint16)[~is_nan])
    assert np.isnan(stored(message, read.size, wire)[is_nan]).all()
    np.testing.assert_array_equal(read, source)


@pytest.mark.parametrize("wire", HALVED)
def test_rounding_is_to_nearest_with_ties_to_even_by_exact_arithmetic(wire):
    x = awkward_numbers()
    expected = np.array([rounded(float(number), wire) for number in x])
    message, source = packed(x, wire)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        np.testing.assert_array_equal(expected, source.astype(np.float64))
    np.testing.assert_array_equal(np.signbit(x[~np.isnan(x)]), np.signbit(source[~np.isnan(x)]))
    np.testing.assert_array_equal(source, stored(message, x.size, wire))
    assert np.isinf(expected[np.isfinite(x)]).any(), "the test must have met an overflow"


def test_bf16_agrees_with_pytorch():
    torch = pytest.importorskip("torch")
    x = awkward_numbers()
    x = x[~np.isnan(x)]
    expected = torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(expected, packed(x, "bf16")[0].view(np.uint16))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800001, 0x7FC00000, 0x7FBFFFFF])
@pytest.mark.parametrize("wire", HALVED)
def test_a_nan_of_any_kind_stays_one_and_spoils_no_neighbour(wire, bits):
    x = np.array([1.5, -2.0, 0.0, np.inf, 3.0], np.float32)
    x.view(np.uint32)[2] = bits
    message, source = packed(x, wire)
    for result in (source, stored(message, 5, wire)):
        np.testing.assert_array_equal(np.array([1.5, -2.0, np.nan, np.inf, 3.0], np.float32), result)


@pytest.mark.parametrize("count", [0, 1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("wire", WIRES)
def test_any_length_is_packed_stored_and_added_and_nothing_beside_it(wire, count):
    rng = np.random.default_rng(count)
    x, y = rng.standard_normal((2, count)).astype(np.float32)
    size = count * wire_itemsize(wire, np.float32)
    around, memory = np.full(size + 4, 0xAA, np.uint8), np.full(count + 2, 9, np.float32)
    memory[1:-1] = x
    pack(memory[1:-1], around[2 : size + 2], wire)
    assert [0xAA] * 4 == [*around[:2], *around[size + 2 :]]
    assert [9, 9] == [memory[0], memory[-1]]
    travelled = memory[1:-1].copy()
    assert np.abs(travelled - x).max(initial=0) <= 2**-8 * np.abs(x).max(initial=0)
    memory[1:-1] = y
    unpack_add(around[2 : size + 2], memory[1:-1], wire)
    np.testing.assert_array_equal(y + travelled, memory[1:-1])
    unpack_store(around[2 : size + 2], memory[1:-1], wire)
    np.testing.assert_array_equal(travelled, memory[1:-1])
    assert [9, 9] == [memory[0], memory[-1]]


@pytest.mark.parametrize("wire", HALVED)
def test_packing_twice_changes_nothing_more(wire):
    first, source = packed(awkward_numbers(), wire)
    second, again = packed(source, wire)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(source.view(np.uint32), again.view(np.uint32))


@pytest.mark.parametrize("wire", HALVED)
def test_a_source_that_nobody_looks_at_again_may_stay_unrounded(wire):
    x = awkward_numbers()
    message, source = packed(x, wire, round_source=False)
    np.testing.assert_array_equal(x.view(np.uint32), source.view(np.uint32))
    np.testing.assert_array_equal(packed(x, wire)[0], message)


@pytest.mark.parametrize("wire", WIRES)
def test_rounding_in_place_is_what_packing_does_to_its_source(wire):
    x = np.resize(awkward_numbers(), BLOCK + 7)
    _, expected = packed(x, wire)
    round_in_place(x, wire)
    np.testing.assert_array_equal(expected.view(np.uint32), x.view(np.uint32))


@pytest.mark.parametrize("wire", HALVED)
def test_sums_keep_the_bits_that_the_wire_has_not(wire):
    total = np.array([1 + 2**-20, 2**-20], np.float32)
    unpack_add(packed(np.array([1.0, 1.0], np.float32), wire)[0], total, wire)
    np.testing.assert_array_equal([2 + 2**-20, 1 + 2**-20], total)


@pytest.mark.parametrize("wire", HALVED)
def test_two_ranks_that_exchange_and_add_end_with_the_same_bits(wire):
    a, b = np.random.default_rng(5).standard_normal((2, 1001)).astype(np.float32)
    (from_a, left), (from_b, right) = packed(a, wire), packed(b, wire)
    unpack_add(from_b, left, wire)
    unpack_add(from_a, right, wire)
    np.testing.assert_array_equal(left.view(np.uint32), right.view(np.uint32))


@pytest.mark.parametrize("wire", HALVED)
def test_no_number_makes_a_warning(wire):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message, _ = packed(awkward_numbers(), wire)
        stored(message, message.size // 2, wire)
        unpack_add(message, np.zeros(message.size // 2, np.float32), wire)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64])
def test_fp32_sends_any_type_as_it_is(dtype):
    x = np.arange(-3, 8).astype(dtype) / 3
    x = x.astype(dtype)
    message, source = packed(x, "fp32")
    assert x.tobytes() == source.tobytes() == message.tobytes()
    np.testing.assert_array_equal(x, stored(message, x.size, "fp32", dtype))
    total = np.ones_like(x)
    unpack_add(message, total, "fp32")
    np.testing.assert_array_equal(x + 1, total)


@pytest.mark.parametrize("wire", HALVED)
def test_only_float32_is_halved(wire):
    assert 2 == wire_itemsize(wire, np.float32)
    assert (4, 8) == (wire_itemsize("fp32", np.float32), wire_itemsize("fp32", np.float64))
    with pytest.raises(CommError, match=rf"dtype float64 cannot travel as {wire}.*'fp32'"):
        wire_itemsize(wire, np.float64)
    with pytest.raises(CommError, match=r"unknown wire type 'fp8'; it must be one of fp32, bf16, fp16"):
        wire_itemsize("fp8", np.float32)


def test_threads_do_not_share_their_temporaries(monkeypatch):
    monkeypatch.setattr(wires, "BLOCK", 1000)  # many small calls, so that threads meet
    arrays = [np.random.default_rng(seed).standard_normal(200_000).astype(np.float32) for seed in range(4)]
    expected, results = [packed(x, "bf16")[0] for x in arrays], [None] * 4

    def work(index: int) -> None:
        results[index] = packed(arrays[index], "bf16")[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, got in zip(expected, results, strict=True):
        np.testing.assert_array_equal(want, got)
