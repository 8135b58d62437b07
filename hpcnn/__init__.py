"""hpcnn: convolutional networks trained with MPI, split layer by layer."""

from hpcnn import blas as _blas

# OpenBLAS reads its core type once, when NumPy loads it: nothing may import NumPy before this line.
_blas.choose_core_type()

__version__ = "0.1.0"
