// Everything that the emulation has to refuse.
#include "tensor_core.cuh"

extern "C" __global__ void divergent_barrier(int* y) {
    if (threadIdx.x < 40)
        __syncthreads();
    else
        y[0] = 1;
    y[1] = 2;
    __syncthreads();
}

extern "C" __global__ void barrier_against_lanes(int* y) {
    if (threadIdx.x == 0)
        __syncthreads();
    else
        y[threadIdx.x] = __shfl_sync(0xffffffff, y[threadIdx.x], 0);
}

extern "C" __global__ void lanes_apart(int* y) {
    if (threadIdx.x % 2)
        y[threadIdx.x] = __shfl_sync(0xffffffff, 1, 0);
    else
        y[threadIdx.x] = __ballot_sync(0xffffffff, 1);
}

extern "C" __global__ void masks_apart(int* y) {
    y[threadIdx.x] = __shfl_sync(threadIdx.x % 32 < 16 ? 0xffffffff : 0xffff0000, 1, 0);
    __syncthreads();
}

extern "C" __global__ void product_of_half_a_warp(float* y) {
    uint32 a[4] = {}, b[2] = {};
    float d[4] = {};
    mma_bf16(d, a, b);
    y[threadIdx.x] = d[0];
}

extern "C" __global__ void write_shared(int at) {
    DYNAMIC_SHARED(memory);
    memory[at] = 1;
}

extern "C" __global__ void read_shared(float* y, int at) {
    DYNAMIC_SHARED(memory);
    *y = reinterpret_cast<float*>(memory)[at];
}

extern "C" __global__ void index_shared(int* y, int at) {
    __shared__ int table[4][8];
    table[threadIdx.x % 4][at] = 1;
    y[threadIdx.x] = table[0][0];
}

// What the block before left there must not be read.
extern "C" __global__ void read_unwritten(float* y) {
    __shared__ float values[32];
    if (blockIdx.x == 0) values[threadIdx.x] = 1.0f;
    y[32 * blockIdx.x + threadIdx.x] = values[threadIdx.x];
    values[threadIdx.x] = 2.0f;
}

extern "C" __global__ void read_global(const float* x, float* y, int at) {
    float value = x[at];
    y[threadIdx.x] = value;
}
extern "C" __global__ void write_global(float* y, int at) { y[at] = 1.0f; }

extern "C" __global__ void read_misaligned(const float* x, float* y) {
    float4 four = *reinterpret_cast<const float4*>(x + 1);
    *y = four.x + four.w;
}

extern "C" __global__ void divide(int* y, int by) { *y = *y / by; }

__device__ __noinline__ int deep(int n) {
    volatile int local[1024];
    local[n % 1024] = n;
    return n == 0 ? 0 : deep(n - 1) + local[n % 1024];
}
extern "C" __global__ void overflow_stack(int* y) { *y = deep(100); }
