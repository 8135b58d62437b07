"""Messages between ranks. The only package that imports mpi4py, and it does so when the first name is used.

MPI starts with `start` or the first collective, never by importing `hpcnn` or one of these modules.
"""

from hpcnn.comm.abort import run_and_exit
from hpcnn.comm.collectives import allgather, allreduce, reduce_scatter
from hpcnn.comm.counters import Traffic
from hpcnn.comm.engine import Engine
from hpcnn.comm.world import World, start

__all__ = ["Engine", "Traffic", "World", "allgather", "allreduce", "reduce_scatter", "run_and_exit", "start"]
