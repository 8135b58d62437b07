"""One stage of butterfly mixing: two ranks meet, and each has the sum of both.

Where the ranks are a power of two, stage s pairs those whose numbers differ in bit s, as a butterfly all-reduce does.
For other numbers of ranks stage s adds to every rank what its 2^s-th next one has, in a circle. Either way, a stage
halved is a doubly stochastic average: it keeps the mean over the ranks. ceil(lg p) stages of the first kind give the
mean, in equal bits; those of the second kind come close to it.

References
----------
Zhao, Canny, "Butterfly mixing: accelerating incremental-update algorithms on clusters", SDM 2013 (the pairs).
"""

from __future__ import annotations

from hpcnn.plan.schedules.schedule import Schedule, Step, Transfer


def num_stages(size: int) -> int:
    """Return ceil(lg size), the stages of one round."""
    return (size - 1).bit_length()


def mixing(rank: int, size: int, count: int, stage: int) -> Schedule:
    """Return the schedule of one stage: one message of all `count` elements from every rank."""
    distance = 1 << stage
    if size & (size - 1):
        reader, source = (rank - distance) % size, (rank + distance) % size
    else:
        reader = source = rank ^ distance
    return Schedule((Step((Transfer(reader, 0, count),), (Transfer(source, 0, count),), "sum"),), count)
