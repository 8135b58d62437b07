// What the convolutions by warp-wide matrix products (mma.sync) share: tiles in shared memory, and one warp's product.
//
// A block computes a tile of D (rows x columns). Slabs of the operands arrive in a ring of stages by cp.async, 4 to 16
// bytes a copy, with zeros wherever there is nothing to read. Positions in a slab are swizzled (xor with the row), so that
// neither the copies nor the loads of fragments have bank conflicts.
#pragma once
#include "tensor_core.cuh"

// Copies `bytes` (4, 8 or 16) to shared memory, or zeros.
template <int bytes> __device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    if constexpr (bytes == 16) {
        copy_async_16(shared, global, valid);
    } else if constexpr (bytes == 4) {
        copy_async_4(shared, global, valid);
    } else {
#ifdef HPCNN_EMULATION
        copy_async_4(shared, global, valid);
        copy_async_4(static_cast<uint8*>(shared) + 4, static_cast<const uint8*>(global) + 4, valid);
#else
        int read = valid ? 8 : 0;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                     "r"(read)
                     : "memory");
#endif
    }
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

// a += b, both below the radices.
__device__ __forceinline__ void advance(Digits& a, const Digits& b, int low_radix, int middle_radix) {
    a.low += b.low;
    a.middle += b.middle;
    a.high += b.high;
    if (a.low >= low_radix) {
        a.low -= low_radix;
        a.middle += 1;
    }
    if (a.middle >= middle_radix) {
        a.middle -= middle_radix;
        a.high += 1;
    }
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

__device__ __forceinline__ uint32 rounded_to_tf32(uint32 bits) {
    union {
        uint32 bits;
        float number;
    } x = {bits};
    return to_tf32(x.number);
}
