// architectures: 90a
// Hopper's instructions one by one, with what they make laid open: bytes in shared memory, and registers.
#include "hopper.cuh"

// Copy one box and dump `bytes` of shared memory as they lie there. `rank` 4 is im2col.
extern "C" __global__ void __launch_bounds__(128, 1)
    copy_dump(const __grid_constant__ TensorMap map, int rank, int c0, int c1, int c2, int c3, int offset_w, int offset_h,
              int bytes, uint8* out) {
    DYNAMIC_SHARED(shared);
    uint64* barrier = reinterpret_cast<uint64*>(shared + bytes);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_arrive_expect(barrier, bytes);
        if (rank == 2) load_tiled_2d(shared, &map, barrier, c0, c1);
        if (rank == 3) load_tiled_3d(shared, &map, barrier, c0, c1, c2);
        if (rank == 4) load_im2col(shared, &map, barrier, c0, c1, c2, c3, offset_w, offset_h);
    }
    barrier_wait(barrier, 0);
    for (int i = threadIdx.x; i < bytes; i += 128) out[i] = shared[i];
}

// Pass a value round through shared memory `turns` times, by two barriers that two warps wait for in turn.
extern "C" __global__ void __launch_bounds__(64, 1) barrier_turns(int turns, int* out) {
    DYNAMIC_SHARED(shared);
    uint64* barriers = reinterpret_cast<uint64*>(shared);
    volatile int* value = reinterpret_cast<volatile int*>(shared + 64);
    int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        barrier_init(barriers, 32);
        barrier_init(barriers + 1, 32);
        barrier_init_fence();
        *value = 0;
    }
    __syncthreads();
    for (int turn = 0; turn < turns; ++turn) {
        if (warp == 1) barrier_wait(barriers, turn % 2);
        else barrier_wait(barriers + 1, turn % 2 ^ 1);
        if (threadIdx.x % 32 == 0) *value = *value * 2 % 1009 + warp + 1;
        named_barrier(1 + warp, 32);
        barrier_arrive(barriers + warp);
    }
    __syncthreads();
    if (threadIdx.x == 0) *out = *value;
}

// The sum of four steps of 64 x 128 products on shared memory given byte by byte (a, then b), thread after thread.
template <typename Step>
__device__ __forceinline__ void products(unsigned char* shared, const uint8* operands, int leading, int advance,
                                         float* out, Step step) {
    constexpr int a_bytes = 64 * 128, b_bytes = 128 * 128;
    for (int i = threadIdx.x; i < a_bytes + b_bytes; i += 128) shared[i] = operands[i];
    shared_fence();
    __syncthreads();
    uint64 a = matrix_descriptor(shared, leading, 1024), b = matrix_descriptor(shared + a_bytes, leading, 1024);
    float sums[64];
    product_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) step(sums, a + descriptor_offset(k * advance), b + descriptor_offset(k * advance), k > 0);
    product_commit();
    product_wait<0>();
#pragma unroll
    for (int i = 0; i < 64; ++i) out[threadIdx.x * 64 + i] = sums[i];
}

extern "C" __global__ void __launch_bounds__(128, 1) products_bf16(const uint8* operands, float* out) {
    DYNAMIC_SHARED(shared);
    products(shared, operands, 16, 32, out,
             [](float(&d)[64], uint64 a, uint64 b, int accumulate) { product_bf16<0>(d, a, b, accumulate); });
}
extern "C" __global__ void __launch_bounds__(128, 1) products_transposed_bf16(const uint8* operands, float* out) {
    DYNAMIC_SHARED(shared);
    products(shared, operands, 8192, 2048, out,
             [](float(&d)[64], uint64 a, uint64 b, int accumulate) { product_bf16<1>(d, a, b, accumulate); });
}
extern "C" __global__ void __launch_bounds__(128, 1) products_tf32(const uint8* operands, float* out) {
    DYNAMIC_SHARED(shared);
    products(shared, operands, 16, 32, out,
             [](float(&d)[64], uint64 a, uint64 b, int accumulate) { product_tf32(d, a, b, accumulate); });
}
