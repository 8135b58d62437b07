// What every device promises to do with arguments, shared memory and sizes; for tests.
#include "common.cuh"

// Write the fields of a structure, and what lies around it.
extern "C" __global__ void contract_arguments(int *out, const float *null, short before, Conv2d conv, double behind,
                                              int64 large) {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    out[0] = null == nullptr;
    out[1] = before;
    out[2] = conv.n;
    out[3] = conv.groups;
    out[4] = static_cast<int>(behind * 8.0);
    out[5] = static_cast<int>(large >> 32);
}

// Reverse a row of `count` numbers for each block by way of dynamic shared memory.
extern "C" __global__ void contract_shared_f32(const float *x, float *y, int count) {
    DYNAMIC_SHARED(memory);
    float *row = reinterpret_cast<float *>(memory);
    int64 start = static_cast<int64>(blockIdx.x) * count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) row[i] = x[start + i];
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) y[start + i] = row[count - 1 - i];
}
