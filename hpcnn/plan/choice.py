"""The algorithm of a collective that is left to choose: a fixed rule, by bytes and number of ranks."""

from __future__ import annotations

SMALL_BYTES = 64 << 10
"""All-reduces up to here are a matter of latency."""

SMALL_BYTES_OF_TWO = 256 << 10
"""The same on two ranks, where halving-doubling sends no fewer bytes and only adds half as many."""

SMALL_BLOCKS_BYTES = 64 << 10
"""All-gathers and reduce-scatters up to here (all blocks together) are a matter of latency."""

MOST_RING_RANKS = 8
"""Above, the ring's p - 1 messages one after the other cost more than what the others send too much."""


def allreduce_algorithm(num_bytes: int, size: int) -> str:
    """Return "butterfly", "halving-doubling" or "ring" for an all-reduce of `num_bytes` over `size` ranks.

    Small messages take the butterfly, which needs the fewest. Large ones take halving-doubling, which sends and adds
    least in few messages; on few ranks whose number is no power of two they take the ring, since folding would send
    everything one more time. The bounds were measured with MPICH in shared memory; where links are slower, the exact
    point matters less, as both curves are flat around it.
    """
    if num_bytes <= (SMALL_BYTES if size > 2 else SMALL_BYTES_OF_TWO):
        return "butterfly"
    return "halving-doubling" if _power_of_two(size) or size > MOST_RING_RANKS else "ring"


def block_algorithm(num_bytes: int, size: int) -> str:
    """Return "butterfly" or "ring" for an all-gather or reduce-scatter of `num_bytes` in all over `size` ranks.

    Both send the same bytes. The butterfly has fewer messages; where its ranges wrap (no power of two) the ring's
    single neighbour is as good for large blocks on few ranks.
    """
    small = num_bytes <= SMALL_BLOCKS_BYTES or size > MOST_RING_RANKS
    return "butterfly" if small or _power_of_two(size) else "ring"


def _power_of_two(size: int) -> bool:
    return size & (size - 1) == 0
