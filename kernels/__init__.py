"""CUDA sources of the GPU operators; none in this version."""
