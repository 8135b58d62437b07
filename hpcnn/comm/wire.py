"""Array elements as message bytes, and back: the one place where the two are converted.

"fp32" sends elements as they are, whatever their type. "bf16" and "fp16" send float32 elements in half the bytes.
Sums are always made in the type of the array, so a halved message is rounded once on its way and never while adding.

A rank that goes on working with what it has sent must hold the numbers that travelled, not those it had before, or
ranks would part in the last bits. So `pack` rounds its source in place as well, and packing twice changes nothing more.

bf16 is float32 without its lower 16 bits: the same range, 8 bits of precision. NumPy has no such type, so the rounding
is done on the bits, in blocks that stay in the cache. fp16 has 11 bits of precision, but larger numbers than 65504
become infinite and those below 6e-8 vanish: gradients may need scaling.
"""

from __future__ import annotations

import threading

import numpy as np

from hpcnn.errors import CommError

WIRES = ("fp32", "bf16", "fp16")
"""Types of the elements in messages."""

BLOCK = 1 << 16
"""Elements converted at a time: few enough for the second-level cache, many enough to forget the cost of the calls."""

_UPPER_HALF = np.uint32(0xFFFF0000)
_ONE, _SHIFT, _BELOW_HALF = np.uint32(1), np.uint32(16), np.uint32(0x7FFF)
_QUIET, _MAGNITUDE, _INFINITY = np.uint32(0x00400000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


class _Scratch(threading.local):
    """Temporaries of one block, for each thread its own."""

    def __init__(self) -> None:
        self.bits = np.empty(BLOCK, np.uint32)


_scratch = _Scratch()


def wire_itemsize(wire: str, dtype: np.dtype | type) -> int:
    """Return the bytes that an element of type `dtype` takes in a message.

    Raises
    ------
    CommError
        If the wire type is unknown, or halves elements that are not float32.
    """
    dtype = np.dtype(dtype)
    if wire == "fp32":
        return dtype.itemsize
    if wire not in WIRES:
        raise CommError(f"comm: unknown wire type '{wire}'; it must be one of {', '.join(WIRES)}.")
    if dtype != np.float32:
        raise CommError(
            f"comm: arrays of dtype {dtype} cannot travel as {wire}; only float32 arrays can be rounded to 16 bits."
            " Use the wire type 'fp32', which sends elements as they are."
        )
    return 2


def pack(source: np.ndarray, message: np.ndarray, wire: str, *, round_source: bool = True) -> None:
    """Write the elements of `source` to `message`, and make `source` equal to what the message says.

    Parameters
    ----------
    source : ndarray, 1-D, contiguous
        The elements; float32 unless `wire` is "fp32".
    message : ndarray of uint8, 1-D, contiguous
        ``source.size * wire_itemsize(wire, source.dtype)`` bytes, at an even address for good speed.
    wire : str
        One of `WIRES`. Rounding is to nearest, ties to even. NaN stays NaN; what is too large becomes infinite.
    round_source : bool
        False leaves `source` alone: for elements that this rank does not look at again.
    """
    if wire == "bf16":
        _pack_bf16(source.view(np.uint32), message.view(np.uint16), round_source)
    elif wire == "fp16":
        half = message.view(np.float16)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for start in range(0, source.size, BLOCK):
                block, target = source[start : start + BLOCK], half[start : start + BLOCK]
                np.copyto(target, block, casting="same_kind")
                if round_source:
                    np.copyto(block, target)
    else:
        np.copyto(message, source.view(np.uint8))


def round_in_place(array: np.ndarray, wire: str) -> None:
    """Make `array`, 1-D and contiguous, equal to what a message of it would say.

    For a rank that sends nothing at the end of a collective, while others send the result on and so round theirs.
    """
    if wire == "bf16":
        _pack_bf16(array.view(np.uint32), None, True)
    elif wire == "fp16":
        message = _scratch.bits.view(np.uint8)
        for start in range(0, array.size, BLOCK):
            block = array[start : start + BLOCK]
            pack(block, message[: 2 * block.size], wire)


def unpack_store(message: np.ndarray, target: np.ndarray, wire: str) -> None:
    """Overwrite `target` by the elements of `message`; shapes and types as for `pack`."""
    if wire == "bf16":
        _widen(message.view(np.uint16), target.view(np.uint32))
    elif wire == "fp16":
        with np.errstate(invalid="ignore"):
            np.copyto(target, message.view(np.float16))
    else:
        np.copyto(target.view(np.uint8), message)


def unpack_add(message: np.ndarray, target: np.ndarray, wire: str) -> None:
    """Add the elements of `message` to `target`, in the type of `target`; shapes and types as for `pack`."""
    if wire == "bf16":
        arrived = message.view(np.uint16)
        for start in range(0, target.size, BLOCK):
            block = target[start : start + BLOCK]
            bits = _scratch.bits[: block.size]
            _widen(arrived[start : start + BLOCK], bits)
            np.add(block, bits.view(np.float32), block)
    elif wire == "fp16":
        with np.errstate(invalid="ignore"):
            np.add(target, message.view(np.float16), target)
    else:
        np.add(target, message.view(target.dtype), target)


def _pack_bf16(source: np.ndarray, message: np.ndarray | None, round_source: bool) -> None:
    """Round the bits of float32 numbers to their upper half, which goes to `message`."""
    for start in range(0, source.size, BLOCK):
        block = source[start : start + BLOCK]
        bits = _scratch.bits[: block.size]
        # Just below half, and one more if the upper half is odd: a carry out of the lower half rounds up. It may run
        # into the exponent, which is right: from the largest subnormal to the smallest normal, from the largest number
        # to infinity.
        np.right_shift(block, _SHIFT, bits)
        np.bitwise_and(bits, _ONE, bits)
        np.add(bits, _BELOW_HALF, bits)
        np.add(bits, block, bits)
        # In a NaN the carry could run into the sign. The largest number of a block is NaN if any is.
        largest = np.maximum.reduce(block.view(np.float32))
        if largest != largest:
            is_nan = (block & _MAGNITUDE) > _INFINITY
            bits[is_nan] = block[is_nan] | _QUIET
        if round_source:
            np.bitwise_and(bits, _UPPER_HALF, block)
        if message is not None:
            np.right_shift(bits, _SHIFT, bits)
            np.copyto(message[start : start + BLOCK], bits, casting="same_kind")


def _widen(halves: np.ndarray, bits: np.ndarray) -> None:
    """Write 16-bit numbers to the upper halves of 32-bit ones."""
    for start in range(0, bits.size, BLOCK):
        block = bits[start : start + BLOCK]
        np.copyto(block, halves[start : start + BLOCK])
        np.left_shift(block, _SHIFT, block)
