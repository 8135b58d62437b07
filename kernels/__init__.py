"""CUDA sources of the GPU operators; `hpcnn.ops.cuda.compile` finds them here once installed."""
