"""Random numbers from counters: a draw depends on what it is for, never on which rank makes it.

Every draw is keyed by (seed, purpose, counters such as epoch or step, ...). Masks and augmentations are functions of
the *global* sample index and element index, so that any split of the work over ranks sees the same numbers.
The mixing function is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

from hpcnn.arrays import Shape
from hpcnn.geometry import Block

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def key(seed: int, purpose: str, *counters: int) -> int:
    """Return a 64-bit key for one purpose, such as ("dropout", layer number, step)."""
    text = ",".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return NumPy's counter-based Philox generator for one purpose, equal on all ranks."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *counters)))


def bits(stream: int, index: np.ndarray) -> np.ndarray:
    """Return 64 random bits for each counter in `index` (uint64), drawn from the stream of key `stream`."""
    with np.errstate(over="ignore"):
        z = index.astype(np.uint64) * np.uint64(_GOLDEN)
        z += np.uint64((stream + _GOLDEN) & _MASK)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z


def uniform(stream: int, index: np.ndarray) -> np.ndarray:
    """Return a float32 in [0, 1) for each counter in `index` (uint64), 24 bits each."""
    return (bits(stream, index) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def sample_elements(samples: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """Return counters (samples, elements): global sample index in the high 32 bits, element's number in the low."""
    return (samples.astype(np.uint64)[:, None] << np.uint64(32)) | elements.astype(np.uint64)[None, :]


def element_numbers(shape: Shape, box: tuple[Block, ...]) -> np.ndarray:
    """Return the numbers, in row-major order, of those elements of a sample of `shape` that lie in `box`."""
    numbers: np.ndarray = np.zeros(1, np.uint64)
    for size, block in zip(shape, box, strict=True):
        numbers = (numbers[:, None] * np.uint64(size) + np.arange(*block, dtype=np.uint64)).reshape(-1)
    return numbers
