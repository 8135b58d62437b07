// What the convolutions by warp-wide matrix products (mma.sync) share: tiles in shared memory, and one warp's product.
//
// A block computes a tile of D (rows x columns). Slabs of the operands arrive in a ring of stages by cp.async, 4 to 16
// bytes a copy, with zeros wherever there is nothing to read. Positions in a slab are swizzled (xor with the row), so
// that neither the copies nor the loads of fragments have bank conflicts.
#pragma once
#include "tensor_core.cuh"

// Keeps what is computed before a loop from being computed again, from thread indices on, in every turn.
template <typename T> __device__ __forceinline__ void hold(T& x) {
#ifndef HPCNN_EMULATION
    if constexpr (sizeof(T) == 8) {
        asm volatile("" : "+l"(x));
    } else {
        asm volatile("" : "+r"(x));
    }
#endif
}

// Copies `bytes` (4, 8 or 16) to shared memory, or zeros. Of 16, what is beside them in a cache line is soon wanted.
template <int bytes> __device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
#ifdef HPCNN_EMULATION
    if constexpr (bytes == 16) {
        copy_async_16(shared, global, valid);
    } else {
        for (int at = 0; at < bytes; at += 4)
            copy_async_4(static_cast<uint8*>(shared) + at, static_cast<const uint8*>(global) + at, valid);
    }
#else
    int read = valid ? bytes : 0;
    if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
                     "l"(global), "r"(read)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)), "l"(global),
                     "n"(bytes), "r"(read)
                     : "memory");
    }
#endif
}

// Which part of a slab (rows of row_bytes, `copy_bytes` a copy) a thread copies: one column, every `step`th row.
template <int rows, int row_bytes, int copy_bytes, int threads> struct Share {
    static constexpr int columns = row_bytes / copy_bytes;
    static constexpr int step = threads / columns;
    static constexpr int count = rows / step;
    static_assert(threads % columns == 0 && rows % step == 0, "a slab must be shared evenly");

    static __device__ __forceinline__ int byte() { return threadIdx.x % columns * copy_bytes; }
    static __device__ __forceinline__ int first_row() { return threadIdx.x / columns; }
};

// Place of a byte in a slab whose rows (64, or a multiple of 128 bytes) are read eight at a time, 16 bytes of each.
template <int row_bytes> __device__ __forceinline__ int swizzled(int row, int byte) {
    if constexpr (row_bytes == 64) {
        return row * row_bytes + (byte ^ (((row >> 1) & 3) << 4));
    } else {
        return row * row_bytes + (byte ^ ((row & 7) << 4));
    }
}

// Positions in mixed radix: `low` counts to low_radix, then `middle` to middle_radix, then `high`.
struct Digits {
    int low, middle, high;
};

__device__ __forceinline__ Digits digits(uint32 number, uint32 low_radix, uint32 middle_radix) {
    uint32 rest = number / low_radix, high = rest / middle_radix;
    return {int(number - rest * low_radix), int(rest - high * middle_radix), int(high)};
}

// a += b, both below the radices. (Selections, not branches: neighbouring threads differ.)
__device__ __forceinline__ void advance(Digits& a, const Digits& b, int low_radix, int middle_radix) {
    const int low = a.low + b.low, carry = low >= low_radix;
    a.low = carry ? low - low_radix : low;
    const int middle = a.middle + b.middle + carry, carry_on = middle >= middle_radix;
    a.middle = carry_on ? middle - middle_radix : middle;
    a.high += b.high + carry_on;
}

// One warp's tile of D, 16 tall x 8 wide products, and the fragments of two steps: one is multiplied while the next
// is loaded. Products of T: bf16, or float rounded to tf32.
template <typename T, int tall, int wide> struct WarpTile {
    float sum[tall][wide][4];
    uint32 a[2][tall][4], b[2][wide][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < tall; i++)
#pragma unroll
            for (int j = 0; j < wide; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[i][j][e] = 0.0f;
    }

    __device__ __forceinline__ void multiply(int which) {
#pragma unroll
        for (int i = 0; i < tall; i++)
#pragma unroll
            for (int j = 0; j < wide; j++) {
                // There and back, so that each product shares an operand with the one before.
                int column = i % 2 ? wide - 1 - j : j;
                if constexpr (sizeof(T) == 2) {
                    mma_bf16(sum[i][column], a[which][i], b[which][column]);
                } else {
                    mma_tf32(sum[i][column], a[which][i], b[which][column]);
                }
            }
    }
};

// Sixteen bytes of outputs.
template <typename T> struct alignas(16) Vector {
    static constexpr int size = 16 / sizeof(T);
    T element[size];
};

__device__ __forceinline__ uint32 rounded_to_tf32(uint32 bits) { return to_tf32(__uint_as_float(bits)); }
