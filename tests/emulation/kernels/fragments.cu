// Matrices in fragments, and asynchronous copies.
#include "tensor_core.cuh"

// d[lane] = what ldmatrix gives lane by lane, of four 8 x 8 matrices that lie as 32 rows of 8.
extern "C" __global__ void fragments(const uint16* x, uint32* d, uint32* transposed) {
    DYNAMIC_SHARED(memory);
    uint16* rows = reinterpret_cast<uint16*>(memory);
    for (int i = threadIdx.x; i < 256; i += 32) rows[i] = x[i];
    __syncwarp();
    uint32 result[4];
    load_matrices(result, rows + 8 * threadIdx.x);
    for (int i = 0; i < 4; i++) d[4 * threadIdx.x + i] = result[i];
    load_matrices_transposed(result, rows + 8 * threadIdx.x);
    for (int i = 0; i < 4; i++) transposed[4 * threadIdx.x + i] = result[i];
}

// d += a b, `times` times; every lane's registers one after the other.
extern "C" __global__ void multiply_bf16(const uint32* a, const uint32* b, float* d, int times) {
    int lane = threadIdx.x % 32;
    uint32 left[4], right[2];
    float sums[4];
    for (int i = 0; i < 4; i++) left[i] = a[4 * lane + i], sums[i] = d[4 * lane + i];
    for (int i = 0; i < 2; i++) right[i] = b[2 * lane + i];
    for (int i = 0; i < times; i++) mma_bf16(sums, left, right);
    __syncthreads();
    for (int i = 0; i < 4; i++) d[4 * lane + i] = sums[i];
}

extern "C" __global__ void multiply_tf32(const uint32* a, const uint32* b, float* d) {
    int lane = threadIdx.x;
    uint32 left[4], right[2];
    float sums[4];
    for (int i = 0; i < 4; i++) left[i] = a[4 * lane + i], sums[i] = d[4 * lane + i];
    for (int i = 0; i < 2; i++) right[i] = b[2 * lane + i];
    mma_tf32(sums, left, right);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = sums[i];
}

extern "C" __global__ void round_tf32(const float* x, uint32* y) { y[threadIdx.x] = to_tf32(x[threadIdx.x]); }

// y = x through two buffers that are filled ahead; waits for all but `newest` groups: 1 is right, 2 too little.
template <int newest> __device__ void stream(const float* x, float* y, int n) {
    __shared__ __align__(16) float buffers[3][128];
    auto start = [&](int step) {
        int i = 128 * step + 4 * threadIdx.x;
        copy_async_16(&buffers[step % 3][4 * threadIdx.x], i < n ? x + i : x, i < n);
        copy_commit();
    };
    int steps = (n + 127) / 128;
    start(0);
    start(1);
    for (int step = 0; step < steps; step++) {
        copy_wait<newest>();
        __syncthreads();
        start(step + 2);
        for (int i = 0; i < 4; i++) y[128 * step + 32 * i + threadIdx.x] = buffers[step % 3][32 * i + threadIdx.x];
    }
}
extern "C" __global__ void stream_waiting(const float* x, float* y, int n) { stream<1>(x, y, n); }
extern "C" __global__ void stream_too_early(const float* x, float* y, int n) { stream<2>(x, y, n); }

extern "C" __global__ void copy_words(const float* x, float* y) {
    __shared__ float words[32];
    copy_async_4(&words[threadIdx.x], x + threadIdx.x, threadIdx.x % 2);
    copy_commit();
    copy_wait<0>();
    y[threadIdx.x] = words[threadIdx.x];
}

extern "C" __global__ void copy_misaligned(const float* x, float* y) {
    __shared__ __align__(16) float words[8];
    copy_async_16(words, x + 1, true);
    copy_commit();
    copy_wait<0>();
    y[0] = words[0];
}
