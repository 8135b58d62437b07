#include "common.cuh"

// y[i] = sum over a block of x, through shared memory.
extern "C" __global__ void __launch_bounds__(256) block_sum_f32(const float* __restrict__ x, float* __restrict__ y, int n) {
    __shared__ float sums[256];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    sums[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncthreads();
    for (int step = blockDim.x / 2; step > 0; step /= 2) {
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
        __syncthreads();
    }
    y[i] = sums[0];
}
