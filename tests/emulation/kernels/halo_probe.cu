// architectures: 90a
// What conv2d_halo.cu relies on, laid open: lines that begin anywhere within the swizzle's pattern, and left operands
// that do.
#include "hopper.cuh"

// Copy `lines` lines of `pitch` pixels, one behind the other, and dump them as they lie there.
extern "C" __global__ void __launch_bounds__(128, 1)
    copy_lines(const __grid_constant__ TensorMap map, int pitch, int lines, int w, int h, int n, uint8* out) {
    DYNAMIC_SHARED(shared);
    int bytes = lines * pitch * 128;
    uint64* barrier = reinterpret_cast<uint64*>(shared + bytes);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_arrive_expect(barrier, bytes);
        for (int i = 0; i < lines; ++i) load_tiled_4d(shared + i * pitch * 128, &map, barrier, 0, w, h + i, n);
    }
    barrier_wait(barrier, 0);
    for (int i = threadIdx.x; i < bytes; i += 128) out[i] = shared[i];
}

// 64 x 128 sums of products, thread after thread, of the left operand that begins in row `first` and goes on `stride`
// bytes after every eight rows; operands are given byte by byte, `left_bytes` (a multiple of 1024) of the left one.
extern "C" __global__ void __launch_bounds__(128, 1)
    products_from(const uint8* operands, int left_bytes, int first, int stride, int based, float* out) {
    DYNAMIC_SHARED(shared);
    for (int i = threadIdx.x; i < left_bytes + 128 * 128; i += 128) shared[i] = operands[i];
    shared_fence();
    __syncthreads();
    unsigned char* left = shared + first * 128;
    uint64 a = matrix_descriptor(left, 16, stride) + (based ? descriptor_base(left) : 0);
    uint64 b = matrix_descriptor(shared + left_bytes, 16, 1024);
    float sums[64];
    product_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) product_bf16<0>(sums, a + descriptor_offset(k * 32), b + descriptor_offset(k * 32), k > 0);
    product_commit();
    product_wait<0>();
#pragma unroll
    for (int i = 0; i < 64; ++i) out[threadIdx.x * 64 + i] = sums[i];
}
