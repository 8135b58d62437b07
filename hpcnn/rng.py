"""Random numbers from counters: a draw depends on what it is for, never on which rank makes it.

Every draw is keyed by (seed, purpose, counters such as epoch or step, ...). Masks and augmentations are functions of
the *global* sample index and element index, so that any split of the work over ranks sees the same numbers.
The mixing function is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

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


def sample_elements(samples: np.ndarray, num_elements: int, first: int = 0) -> np.ndarray:
    """Return counters (len(samples), num_elements): global sample index in the high 32 bits, element in the low."""
    elements = np.arange(first, first + num_elements, dtype=np.uint64)
    return (samples.astype(np.uint64)[:, None] << np.uint64(32)) | elements[None, :]
