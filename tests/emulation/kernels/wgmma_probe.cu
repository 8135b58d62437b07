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

// As barrier_wait, but gives up after about a second: what is wrong about clusters must not hang the device.
__device__ __forceinline__ bool barrier_wait_a_while(uint64* barrier, uint32 parity) {
#ifdef HPCNN_EMULATION
    barrier_wait(barrier, parity);
    return true;
#else
    uint32 done = 0;
    for (int i = 0; i < 10000000 && !done; ++i)
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                     : "=r"(done) : "r"(shared_window(barrier)), "r"(parity) : "memory");
    return done;
#endif
}

// Every block says its rank, and whether all of its cluster have arrived at its barrier, in each of `turns` phases.
extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(32, 1) cluster_turns(int turns, int* out) {
    DYNAMIC_SHARED(shared);
    uint64* barrier = reinterpret_cast<uint64*>(shared);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 4 * 2);
        barrier_init_fence();
    }
    cluster_sync();
    int ended = 0;
    for (int turn = 0; turn < turns; ++turn) {
        if (threadIdx.x < 8) barrier_arrive_at(barrier, threadIdx.x % 4);  // two for each block
        ended += barrier_wait_a_while(barrier, turn % 2);
        __syncwarp();  // no lane waits for a phase when another arrives for the one after the next
    }
    if (threadIdx.x == 0) {
        out[2 * blockIdx.x] = cluster_rank();
        out[2 * blockIdx.x + 1] = ended;
    }
    cluster_sync();
}

// Block r of a cluster copies one box, at c1 + 16 r (tiled) or of image c3 + r (im2col), to slot r of the blocks in bits
// 4 r to 4 r + 3 of `ranks`. Every block dumps its four slots, of `bytes`; what nothing came to holds 0xee.
extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(128, 1)
    multicast_dump(const __grid_constant__ TensorMap map, int rank, int c0, int c1, int c2, int c3, int offset_w,
                   int offset_h, int ranks, int bytes, int* ended, uint8* out) {
    DYNAMIC_SHARED(shared);
    uint64* barrier = reinterpret_cast<uint64*>(shared + 4 * bytes);
    for (int i = threadIdx.x; i < 4 * bytes; i += 128) shared[i] = 0xee;
    shared_fence();
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
    }
    cluster_sync();
    int me = cluster_rank();
    if (threadIdx.x == 0) {
        int expected = 0;
        for (int r = 0; r < 4; ++r) expected += (ranks >> (4 * r + me) & 1) * bytes;
        barrier_arrive_expect(barrier, expected);
        int targets = ranks >> 4 * me & 15;
        unsigned char* slot = shared + me * bytes;
        if (rank == 2) multicast_tiled_2d(slot, &map, barrier, targets, c0, c1 + 16 * me);
        if (rank == 3) multicast_tiled_3d(slot, &map, barrier, targets, c0, c1, c2 + 16 * me);
        if (rank == 4) multicast_im2col(slot, &map, barrier, targets, c0, c1, c2, c3 + me, offset_w, offset_h);
    }
    bool done = barrier_wait_a_while(barrier, 0);
    if (threadIdx.x == 0) ended[blockIdx.x] = done;
    out += blockIdx.x * 4 * bytes;
    for (int i = threadIdx.x; i < 4 * bytes; i += 128) out[i] = shared[i];
    cluster_sync();
}
