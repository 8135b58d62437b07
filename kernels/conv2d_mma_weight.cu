// Gradient of a convolution's filters on tensor cores, as a product of matrices (implicit GEMM).
//
// D has a row for every filter and a column for every tap and channel; the reduction runs over output pixels (sample,
// row, column). In memory the reduction is the slow index of both operands, so slabs lie in shared memory with a row
// per pixel, and fragments are transposed as they are loaded: by ldmatrix where elements have two bytes. Of float32, 16
// bytes are loaded at a time, and belong to four rows (or columns) of D; so these are numbered in another order.
//
// The pixels may be split among blocks: then partial sums go to scratch, and conv2d_mma_reduce adds them in order.
#include "conv2d_mma.cuh"

// Place of a byte in a slab with a row per pixel.
template <typename T, int row_bytes> __device__ __forceinline__ int transposed_place(int row, int byte) {
    static_assert(row_bytes % 128 == 0, "rows must span all banks");
    if constexpr (sizeof(T) == 2) {
        return swizzled<row_bytes>(row, byte);
    } else {
        return row * row_bytes + (byte ^ ((row & 3) << 5));  // a load takes 32 bytes of each of four rows
    }
}

// Rows that far apart are swizzled alike.
template <typename T> constexpr int swizzle_period = sizeof(T) == 2 ? 8 : 4;

// Copies slabs: `depth` pixels of grad_output (tall filters) and behind them of x (wide taps and channels).
template <typename T, int tall, int wide, int depth, int threads, int copy_bytes> struct PixelLoader {
    static constexpr int grad_bytes = tall * sizeof(T), x_bytes = wide * sizeof(T);
    using Grad = Share<depth, grad_bytes, 16, threads>;
    using X = Share<depth, x_bytes, copy_bytes, threads>;

    const Conv2d& g;
    const T *grad, *x;
    bool grad_valid, x_valid;
    int grad_place, x_place;    // in a slab
    int grad_pixels, x_pixels;  // left, counted from this thread's first
    int dh, dw;                 // of this thread's tap
    Digits step, pixel[X::count];  // column, row, sample of outputs

    __device__ __forceinline__ PixelLoader(const Conv2d& geometry, const T* images, const T* grad_output, int row0,
                                           int column0, int begin, int end)
        : g(geometry) {
        const int filter = row0 + Grad::byte() / int(sizeof(T)), column = column0 + X::byte() / int(sizeof(T));
        grad_valid = filter < g.k;
        grad = grad_output + int64(begin + Grad::first_row()) * g.k + filter;
        const Digits tap = digits(column, g.c, g.s);
        x_valid = tap.high < g.r;
        dh = tap.high * g.dilation_h - g.pad_top;
        dw = tap.middle * g.dilation_w - g.pad_left;
        x = images + tap.low;
        step = digits(depth, g.q, g.p);
#pragma unroll
        for (int i = 0; i < X::count; i++) pixel[i] = digits(begin + X::first_row() + i * X::step, g.q, g.p);
        grad_pixels = end - begin - Grad::first_row();
        x_pixels = end - begin - X::first_row();
        grad_place = transposed_place<T, grad_bytes>(Grad::first_row(), Grad::byte());
        x_place = transposed_place<T, x_bytes>(X::first_row(), X::byte() & ~15) + (X::byte() & 15);
        hold(grad);
        hold(x);
        hold(grad_place);
        hold(x_place);
        hold(grad_pixels);
        hold(x_pixels);
    }

    // Starts the copies of the next slab.
    __device__ __forceinline__ void load(uint8* slab) {
        static_assert(Grad::step % swizzle_period<T> == 0, "rows of a thread must be swizzled alike");
#pragma unroll
        for (int i = 0; i < Grad::count; i++)
            copy_async<16>(slab + grad_place + i * Grad::step * grad_bytes, grad + i * Grad::step * g.k,
                           grad_valid & (i * Grad::step < grad_pixels));
        slab += depth * grad_bytes;
#pragma unroll
        for (int i = 0; i < X::count; i++) {
            const int h = pixel[i].middle * g.stride_h + dh, w = pixel[i].low * g.stride_w + dw;
            const bool valid = x_valid & (i * X::step < x_pixels) & (uint32(h) < uint32(g.h)) &
                               (uint32(w) < uint32(g.w));
            const T* image = x + int64(pixel[i].high) * (g.h * g.w * g.c);
            copy_async<copy_bytes>(slab + place_of_x(i), image + (h * g.w + w) * g.c, valid);
            advance(pixel[i], step, g.q, g.p);
        }
        grad += depth * g.k;
        grad_pixels -= depth;
        x_pixels -= depth;
    }

    __device__ __forceinline__ int place_of_x(int i) const {
        if constexpr (X::step % swizzle_period<T> == 0) return x_place + i * X::step * x_bytes;
        return transposed_place<T, x_bytes>(X::first_row() + i * X::step, X::byte() & ~15) + (X::byte() & 15);
    }
};

// Rows and columns of a warp's tile that a thread's sums belong to.
template <typename T> __device__ __forceinline__ int tile_row(int i, int half) {
    const int group = threadIdx.x % 32 / 4;
    return sizeof(T) == 2 ? i * 16 + half * 8 + group : i / 2 * 32 + group * 4 + i % 2 * 2 + half;
}
template <typename T> __device__ __forceinline__ int tile_column(int j, int odd) {
    const int column = threadIdx.x % 4 * 2 + odd;
    return sizeof(T) == 2 ? j * 8 + column : j / 4 * 32 + column * 4 + j % 4;
}

// Where a lane finds the first fragments of a warp's tile in a slab of grad_output or x; the tile begins `at` bytes
// into its rows.
template <typename T, int row_bytes> __device__ __forceinline__ int grad_fragment(int at) {
    const int lane = threadIdx.x % 32;
    if (sizeof(T) == 2) return transposed_place<T, row_bytes>(lane / 16 * 8 + lane % 8, at + lane / 8 % 2 * 16);
    return transposed_place<T, row_bytes>(lane % 4, at + lane / 4 * 16);
}
template <typename T, int row_bytes> __device__ __forceinline__ int x_fragment(int at) {
    const int lane = threadIdx.x % 32;
    if (sizeof(T) == 2) return transposed_place<T, row_bytes>(lane % 16, at + lane / 16 * 16);
    return transposed_place<T, row_bytes>(lane % 4, at + lane / 4 * 16);
}

// Loads the fragments of 16 pixels of bf16; a step of 32 bytes along a row is among the swizzled bits.
template <int grad_bytes, int x_bytes, int tall, int wide>
__device__ __forceinline__ void load_transposed(WarpTile<bf16, tall, wide>& tile, int which, const uint8* grad,
                                                int grad_at, const uint8* x, int x_at) {
#pragma unroll
    for (int i = 0; i < tall; i++) load_matrices_transposed(tile.a[which][i], grad + (grad_at ^ i * 32));
#pragma unroll
    for (int j = 0; j < wide; j += 2) {
        uint32 d[4];
        load_matrices_transposed(d, x + (x_at ^ j * 16));
        tile.b[which][j][0] = d[0];
        tile.b[which][j][1] = d[1];
        tile.b[which][j + 1][0] = d[2];
        tile.b[which][j + 1][1] = d[3];
    }
}

// The same of 8 pixels of float32, in the order of tile_row and tile_column.
template <int grad_bytes, int x_bytes, int tall, int wide>
__device__ __forceinline__ void load_transposed(WarpTile<float, tall, wide>& tile, int which, const uint8* grad,
                                                int grad_at, const uint8* x, int x_at) {
    static_assert(tall % 2 == 0 && wide % 4 == 0, "a load serves two products' rows, or four products' columns");
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < tall; i += 2) {
            auto v = *reinterpret_cast<const Vector<float>*>(grad + grad_at + half * 4 * grad_bytes + i * 64);
#pragma unroll
            for (int e = 0; e < 4; e++) tile.a[which][i + e / 2][half * 2 + e % 2] = to_tf32(v.element[e]);
        }
#pragma unroll
        for (int j = 0; j < wide; j += 4) {
            auto v = *reinterpret_cast<const Vector<float>*>(x + x_at + half * 4 * x_bytes + j * 32);
#pragma unroll
            for (int e = 0; e < 4; e++) tile.b[which][j + e][half] = to_tf32(v.element[e]);
        }
    }
}

// Stores a warp's sums; `places` says where each column goes in a filter of `length` gradients, -1 for nowhere.
template <typename T, int tall, int wide>
__device__ __forceinline__ void store_filters(const WarpTile<T, tall, wide>& tile, float* out, int row0,
                                              const int* places, int filters, int length) {
#pragma unroll
    for (int i = 0; i < tall; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int filter = row0 + tile_row<T>(i, half);
            if (filter >= filters) continue;
            float* to = out + int64(filter) * length;
#pragma unroll
            for (int j = 0; j < wide; j++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    int place = places[tile_column<T>(j, odd)];
                    if (place >= 0) to[place] = tile.sum[i][j][half * 2 + odd];
                }
        }
}

// One tile of tall filters x wide taps and channels; grid: (tiles, 1, splits), tiles of filters fastest. In `g` filters
// and channels are those of memory; those past `filters` and `channels` are zeros, and have no gradient.
template <typename T, int tall, int wide, int depth, int warp_rows, int warp_columns, int stages, int copy_bytes>
__device__ __forceinline__ void weight_tile(const T* x, const T* grad_output, float* grad_weight, const Conv2d& g,
                                            int filters, int channels) {
    constexpr int threads = warp_rows * warp_columns * 32, grad_bytes = tall * sizeof(T), x_bytes = wide * sizeof(T);
    constexpr int slab_bytes = depth * (grad_bytes + x_bytes), part_depth = 32 / sizeof(T), parts = depth / part_depth;
    constexpr int warp_tall = tall / warp_rows, warp_wide = wide / warp_columns;
    DYNAMIC_SHARED(shared);
    const int tiles = (filters + tall - 1) / tall, length = g.r * g.s * channels;
    const int row0 = blockIdx.x % tiles * tall, column0 = blockIdx.x / tiles * wide;
    const int all_slabs = ceil_div(int64(g.n) * g.p * g.q, depth);
    const int begin = int64(all_slabs) * blockIdx.z / gridDim.z;
    const int count = int64(all_slabs) * (blockIdx.z + 1) / gridDim.z - begin;
    PixelLoader<T, tall, wide, depth, threads, copy_bytes> loader(g, x, grad_output, row0, column0, begin * depth,
                                                                  g.n * g.p * g.q);
    int* places = reinterpret_cast<int*>(shared + stages * slab_bytes);
    for (int i = threadIdx.x; i < wide; i += threads) {
        int tap = (column0 + i) / g.c, channel = (column0 + i) % g.c;
        places[i] = tap < g.r * g.s && channel < channels ? tap * channels + channel : -1;
    }
    const int warp = threadIdx.x / 32;
    const int warp_row = warp % warp_rows * warp_tall, warp_column = warp / warp_rows * warp_wide;
    int grad_at = grad_fragment<T, grad_bytes>(warp_row * sizeof(T));
    int x_at = x_fragment<T, x_bytes>(warp_column * sizeof(T));
    hold(grad_at);
    hold(x_at);
    WarpTile<T, warp_tall / 16, warp_wide / 8> tile;
    tile.clear();
#pragma unroll
    for (int stage = 0; stage < stages - 1; stage++) {
        if (stage < count) loader.load(shared + stage * slab_bytes);
        copy_commit();
    }
    copy_wait<stages - 2>();
    __syncthreads();
    int read = 0, write = (stages - 1) * slab_bytes;
    load_transposed<grad_bytes, x_bytes>(tile, 0, shared, grad_at, shared + depth * grad_bytes, x_at);
    for (int slab = 0; slab < count; slab++) {
#pragma unroll
        for (int part = 0; part < parts; part++) {
            if (part == parts - 1) {
                copy_wait<stages - 2>();
                __syncthreads();
                read = read + slab_bytes == stages * slab_bytes ? 0 : read + slab_bytes;
            }
            const int pixel = (part + 1) % parts * part_depth;
            const uint8 *grad = shared + read + pixel * grad_bytes, *from = shared + read + depth * grad_bytes;
            load_transposed<grad_bytes, x_bytes>(tile, (part + 1) % 2, grad, grad_at, from + pixel * x_bytes, x_at);
            if (part == 0) {
                if (slab + stages - 1 < count) loader.load(shared + write);
                copy_commit();
                write = write + slab_bytes == stages * slab_bytes ? 0 : write + slab_bytes;
            }
            tile.multiply(part % 2);
        }
    }
    copy_wait<0>();
    float* out = grad_weight + blockIdx.z * (int64(filters) * length);
    store_filters<T>(tile, out, row0 + warp_row, places + warp_column, filters, length);
}

#define WEIGHT(name, T, tall, wide, depth, warp_rows, warp_columns, stages, copy_bytes)                               \
    extern "C" __global__ void __launch_bounds__(warp_rows* warp_columns * 32)                                         \
        conv2d_weight_mma_##name(const T* x, const T* grad_output, float* grad_weight, Conv2d g, int filters,         \
                                 int channels) {                                                                      \
        weight_tile<T, tall, wide, depth, warp_rows, warp_columns, stages, copy_bytes>(x, grad_output, grad_weight, g, \
                                                                                       filters, channels);            \
    }

WEIGHT(256x128_bf16, bf16, 256, 128, 32, 4, 2, 4, 16)
WEIGHT(128x128_bf16, bf16, 128, 128, 32, 2, 2, 4, 16)
WEIGHT(64x128_bf16, bf16, 64, 128, 32, 2, 2, 4, 16)
WEIGHT(64x64_bf16, bf16, 64, 64, 64, 2, 2, 3, 16)
WEIGHT(64x64_narrow_bf16, bf16, 64, 64, 32, 2, 2, 4, 8)
WEIGHT(256x128_tf32, float, 256, 128, 16, 4, 2, 4, 16)
WEIGHT(128x128_tf32, float, 128, 128, 16, 2, 2, 4, 16)
WEIGHT(64x128_tf32, float, 64, 128, 16, 2, 2, 4, 16)
WEIGHT(64x64_tf32, float, 64, 64, 32, 2, 2, 3, 16)
WEIGHT(64x64_narrow_tf32, float, 64, 64, 16, 2, 2, 4, 4)
