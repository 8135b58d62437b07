"""The CUDA implementation of every operator, on CuPy arrays of float32 or bfloat16; kernels are in `kernels/`."""
