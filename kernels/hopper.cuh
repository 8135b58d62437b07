// Hopper's own instructions (sm_90a), one wrapper each: barriers in shared memory, the tensor copy engine, and products
// of matrices in shared memory by groups of four warps. tests/emulation has the same functions for the CPU.
//
// After the PTX ISA: "mbarrier", "cp.async.bulk.tensor", "Asynchronous Warpgroup Level Matrix Multiply-Accumulate
// Instructions".
#pragma once
#include "common.cuh"

// What the copy engine has to know of a tensor; hpcnn.ops.cuda.tensor_map encodes it.
struct alignas(64) TensorMap {
    uint64 opaque[16];
};

#ifdef HPCNN_EMULATION
#include "hopper_emulation.h"
#else

__device__ __forceinline__ uint32 shared_window(const void* p) {
    return static_cast<uint32>(__cvta_generic_to_shared(p));
}

// ---- barriers: a phase ends once `count` threads have arrived and all bytes announced for it are there ----

__device__ __forceinline__ void barrier_init(uint64* barrier, uint32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_window(barrier)), "r"(count) : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_window(barrier)) : "memory");
}

// Arrive, and announce bytes that the copy engine will bring in this phase.
__device__ __forceinline__ void barrier_arrive_expect(uint64* barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_window(barrier)), "r"(bytes)
                 : "memory");
}

// Return once the phase of this parity has ended. A new barrier is in phase 0; that before it, of parity 1, has ended.
__device__ __forceinline__ void barrier_wait(uint64* barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\n"
        "bra again;\n"
        "ready:\n"
        "}\n" ::"r"(shared_window(barrier)), "r"(parity)
        : "memory");
}

// Wait until `threads` threads (whole warps) have come to barrier `id` (1 to 15; __syncthreads uses 0).
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Lets products and the copy engine see what this thread has written to shared memory.
__device__ __forceinline__ void shared_fence() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// ---- the copy engine: global to shared memory, zeros outside the tensor, bytes counted by `barrier` ----

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_tiled_2d(void* shared, const TensorMap* map, uint64* barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];\n" ::"r"(shared_window(shared)),
        "l"(map), "r"(shared_window(barrier)), "r"(c0), "r"(c1)
        : "memory");
}

__device__ __forceinline__ void load_tiled_3d(void* shared, const TensorMap* map, uint64* barrier, int c0, int c1,
                                              int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];\n" ::"r"(shared_window(shared)),
        "l"(map), "r"(shared_window(barrier)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

__device__ __forceinline__ void load_tiled_4d(void* shared, const TensorMap* map, uint64* barrier, int c0, int c1,
                                              int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];\n" ::"r"(shared_window(shared)),
        "l"(map), "r"(shared_window(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// Channels from `c` of the pixels from base pixel (n, h, w) on, each moved by (offset_h, offset_w).
__device__ __forceinline__ void load_im2col(void* shared, const TensorMap* map, uint64* barrier, int c, int w, int h,
                                            int n, int offset_w, int offset_h) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2], {%7, %8};\n" ::"r"(shared_window(shared)),
        "l"(map), "r"(shared_window(barrier)), "r"(c), "r"(w), "r"(h), "r"(n),
        "h"(static_cast<uint16>(offset_w)), "h"(static_cast<uint16>(offset_h))
        : "memory");
}

// ---- clusters: blocks that run together and reach each other's shared memory ----

__device__ __forceinline__ int cluster_rank() {
    uint32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
}

// Wait until all threads of the cluster have come here.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// Arrive at the barrier that lies at the same place in the shared memory of another block (or of this one).
__device__ __forceinline__ void barrier_arrive_at(uint64* barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}\n" ::"r"(shared_window(barrier)), "r"(rank)
        : "memory");
}

// Copies to the same place in the shared memory of all blocks whose bit is set in `ranks`; each one's barrier at the
// place of `barrier` counts the bytes that come to it.
__device__ __forceinline__ void multicast_tiled_2d(void* shared, const TensorMap* map, uint64* barrier, int ranks,
                                                   int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5}], [%2], %3;\n" ::"r"(shared_window(shared)),
        "l"(map), "r"(shared_window(barrier)), "h"(static_cast<uint16>(ranks)), "r"(c0), "r"(c1)
        : "memory");
}

__device__ __forceinline__ void multicast_tiled_3d(void* shared, const TensorMap* map, uint64* barrier, int ranks,
                                                   int c0, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6}], [%2], %3;\n" ::"r"(shared_window(shared)),
        "l"(map), "r"(shared_window(barrier)), "h"(static_cast<uint16>(ranks)), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

__device__ __forceinline__ void multicast_im2col(void* shared, const TensorMap* map, uint64* barrier, int ranks, int c,
                                                 int w, int h, int n, int offset_w, int offset_h) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6, %7}], [%2], {%8, %9}, %3;\n" ::"r"(shared_window(shared)),
        "l"(map), "r"(shared_window(barrier)), "h"(static_cast<uint16>(ranks)), "r"(c), "r"(w), "r"(h), "r"(n),
        "h"(static_cast<uint16>(offset_w)), "h"(static_cast<uint16>(offset_h))
        : "memory");
}

// ---- products of matrices in shared memory ----

template <int registers> __device__ __forceinline__ void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(registers));
}
template <int registers> __device__ __forceinline__ void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(registers));
}

// Before the first product that uses accumulators which other instructions wrote or read.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Return when all but the `newest` groups of products are done.
template <int newest> __device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(newest) : "memory");
}

// Zeros for accumulators that no product sets. Volatile, so that they stay behind their branch.
template <int registers> __device__ __forceinline__ void clear(float (&d)[registers]) {
#pragma unroll
    for (int i = 0; i < registers; ++i) asm volatile("mov.f32 %0, 0f00000000;\n" : "=f"(d[i]));
}

// d (64 x n) = a (64 x 32 bytes) * b (32 bytes x n), plus d where `accumulate` is not zero; a and b by descriptor.
// `transposed`: both matrices lie in memory along m and n, not along the dimension that is summed (bf16 only).
// Thread t of the group holds, of each 8 columns j, elements (row, 8 j + column), (row, 8 j + column + 1) and both 8
// rows below as d[4 j] to d[4 j + 3]; row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2.
#define REGISTERS_0 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_1 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_2 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, " \
    "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_3 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLOATS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLOATS_8(i) FLOATS_4(i), FLOATS_4(i + 4)
#define FLOATS_32(i) FLOATS_8(i), FLOATS_8(i + 8), FLOATS_8(i + 16), FLOATS_8(i + 24)
#define PRODUCTS(n, registers, a, b, accumulate, transposed_, ...)                                                \
    template <int transposed>                                                                                     \
    __device__ __forceinline__ void product_bf16(float (&d)[n / 2], uint64 left, uint64 right, int accumulates) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, " a ", " b        \
                     ", p, 1, 1, " transposed_ ", " transposed_ ";\n}\n"                                          \
                     : __VA_ARGS__                                                                                \
                     : "l"(left), "l"(right), "r"(accumulates), "n"(transposed));                                 \
    }                                                                                                             \
    __device__ __forceinline__ void product_tf32(float (&d)[n / 2], uint64 left, uint64 right, int accumulates) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                      \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" registers "}, " a ", " b         \
                     ", p, 1, 1;\n}\n"                                                                            \
                     : __VA_ARGS__                                                                                \
                     : "l"(left), "l"(right), "r"(accumulates));                                                  \
    }
PRODUCTS(64, REGISTERS_0, "%32", "%33", "%34", "%35", FLOATS_32(0))
PRODUCTS(128, REGISTERS_0 REGISTERS_1, "%64", "%65", "%66", "%67", FLOATS_32(0), FLOATS_32(32))
PRODUCTS(192, REGISTERS_0 REGISTERS_1 REGISTERS_2, "%96", "%97", "%98", "%99",
         FLOATS_32(0), FLOATS_32(32), FLOATS_32(64))
PRODUCTS(256, REGISTERS_0 REGISTERS_1 REGISTERS_2 REGISTERS_3, "%128", "%129", "%130", "%131",
         FLOATS_32(0), FLOATS_32(32), FLOATS_32(64), FLOATS_32(96))
#undef PRODUCTS
#endif

// Describe a matrix in shared memory that was loaded with the 128-byte swizzle: rows of 128 bytes, eight of which are
// the pattern, at an address divisible by 1024 (plus less than 128 to begin within a row). `stride`: bytes from eight
// rows to the next eight; `leading`: bytes from 128 bytes of a row to the next, where a row lies along m or n.
__device__ __forceinline__ uint64 matrix_descriptor(const void* shared, int leading, int stride) {
    return (static_cast<uint64>(shared_window(shared) & 0x3FFFF) >> 4) | (static_cast<uint64>(leading >> 4) << 16) |
           (static_cast<uint64>(stride >> 4) << 32) | (1ull << 62);
}

// What is added to a descriptor to move its start by `bytes`.
__device__ __forceinline__ uint64 descriptor_offset(int bytes) { return static_cast<uint64>(bytes >> 4); }

// What is added to the descriptor of a matrix that begins in the middle of a pattern of eight rows, for hardware that
// counts the pattern's rows from the matrix's first ("base offset"), not from addresses divisible by 1024.
__device__ __forceinline__ uint64 descriptor_base(const void* shared) {
    return static_cast<uint64>(shared_window(shared) >> 7 & 7) << 49;
}
