"""Collectives as data: who sends which index range to whom, in which step.

One description serves the engine that runs it over MPI, the simulator that prices it, the tests that interpret it in
memory and `hpcnn plan`, which counts its messages. Nothing here knows MPI or arrays.

With p ranks, q = 2^k the largest power of two not above p, f = p - q ranks folded away, c = ceil(lg p), n elements; for
"hierarchical" N nodes of s = p/N ranks each, and R = 2 lg N messages if N is a power of two, else 2 (N-1):

=================  ==========================================  ===========================================
all-reduce         messages sent by a rank                     elements sent by a rank (q, p dividing n)
=================  ==========================================  ===========================================
butterfly          k  (pair: 1 folded, k + 1 staying)          n k  (pair: n folded, n (k + 1) staying)
halving-doubling   2k (pair: 2 folded, 2k + 2 staying)         2n (q-1)/q  (pair: n folded, + 3n/2 staying)
ring               2 (p-1)                                     2 (p-1) blocks, about 2n (p-1)/p
hierarchical       2 ceil(lg s) + wraps, in the node           2n (s-1)/s in the node
                   R to other nodes                            2 (n/s) (N-1)/N to other nodes
=================  ==========================================  ===========================================

Whatever the algorithm, in an all-gather a rank receives every element but its own block b once, n - b elements; in a
reduce-scatter, its adjoint, it sends as many. With equal blocks (and nodes) it also sends (receives) so many. Messages:

=================  =====================================================================================
all-gather         messages sent by a rank (its adjoint, reduce-scatter: received)
=================  =====================================================================================
butterfly          c, and one more for each range that wraps past the last rank (p no power of two)
ring, pairwise     p - 1; the ring's to one neighbour, the pairwise ones straight from owner to reader
hierarchical       in ceil(lg N) steps between nodes, 2 ceil(lg s) inside: one message a contiguous range,
                   between nodes at most N - 1 where a node's blocks lie together;
                   (N-1) b elements of equal blocks to other nodes, hence each block once to each node
=================  =====================================================================================

Nodes of different sizes: m, the ranks of the smallest, stands for s between nodes, where the other ranks send nothing;
the all-reduce adds two steps that carry at most a rank's block and a lane's share, n/s + n/m, inside the node.

All-to-all "pairwise" sends p - 1 messages, a rank's row without its own block; `gather` one, the own block.

Folding: of the first 2f ranks each even one hands its data to its odd neighbour, which takes part for both and returns
the result. So a staying rank is busy in k + 2 (butterfly) or 2k + 3 (halving-doubling) steps.

Butterfly and halving-doubling add every element in one and the same binary tree, ascending distances 1, 2, 4, ... over
the ranks that take part: ((0+1)+(2+3))+... for a power of two. They give the same bits as each other on all ranks, and
so does hierarchical where nodes and ranks per node are powers of two and the ranks of a node follow each other: it then
is halving-doubling, message for message. The ring adds block i in the order i-1, i-2, ..., i, which differs by block
but again not by rank. Every algorithm leaves the same bits on all ranks; for the same bits on any number of ranks see
`tree.py`, whose schedules sum over virtual shards.

References
----------
Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19(1), 2005.
Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing systems",
IEEE TPDS 8(11), 1997.
"""

from __future__ import annotations

from hpcnn.plan.schedules.checks import validate
from hpcnn.plan.schedules.collectives import (
    ALLREDUCE_ALGORITHMS,
    BLOCK_ALGORITHMS,
    allgather,
    allreduce,
    reduce_scatter,
)
from hpcnn.plan.schedules.direct import ALLTOALL_ALGORITHMS, alltoall, alltoall_places, gather
from hpcnn.plan.schedules.mixing import mixing, num_stages
from hpcnn.plan.schedules.schedule import Addition, Combine, Schedule, Step, Transfer

__all__ = [
    "ALLREDUCE_ALGORITHMS",
    "ALLTOALL_ALGORITHMS",
    "BLOCK_ALGORITHMS",
    "Addition",
    "Combine",
    "Schedule",
    "Step",
    "Transfer",
    "allgather",
    "allreduce",
    "alltoall",
    "alltoall_places",
    "gather",
    "mixing",
    "num_stages",
    "reduce_scatter",
    "validate",
]
