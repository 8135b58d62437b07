// Convolution on tensor cores as a product of matrices (implicit GEMM): forward, and the gradient of the input.
//
// Both gather: an output pixel sums filter taps times source pixels that lie an arithmetic progression apart. A strided
// input gradient falls into phases (output pixels by their remainder modulo the stride), each of which meets its own
// progression of taps, so that no product with a zero is made. `Gather` states all of this in integers; which pass it
// is the kernel does not know. Rows of D are output pixels of one phase, columns filters; the reduction runs over tap
// rows, tap columns and channels, channels fastest, as both operands lie in memory.
//
// The reduction may be split among blocks: then partial sums go to scratch, and conv2d_mma_reduce adds them in order.
#include "conv2d_mma.cuh"

constexpr int MAX_PHASES = 8;

// One axis: output phase + a * phases reads source a * step + first[phase] + i * tap_step through filter tap
// filter_first[phase] + i * filter_step, for i below taps[phase].
struct Axis {
    int source, outputs, filter, phases, step, tap_step, filter_step;
    int first[MAX_PHASES], taps[MAX_PHASES], filter_first[MAX_PHASES];
};

// source (count, rows.source, columns.source, channels), filter (filters, rows.filter, columns.filter, channels),
// out (count, rows.outputs, columns.outputs, filters).
struct Gather {
    int count, channels, filters, splits;
    Axis rows, columns;
};

// An axis as one phase sees it.
struct Phase {
    int index, extent, first, taps, filter_first;

    __device__ __forceinline__ Phase(const Axis& axis, int which) : index(which) {
        extent = (axis.outputs - which + axis.phases - 1) / axis.phases;
        first = axis.first[which];
        taps = axis.taps[which];
        filter_first = axis.filter_first[which];
    }
};

// Copies slabs of `tall` source rows and `wide` filter rows, `row_bytes` of the reduction each.
template <typename T, int tall, int wide, int row_bytes, int threads, int copy_bytes> struct GatherLoader {
    using Source = Share<tall, row_bytes, copy_bytes, threads>;
    using Filter = Share<wide, row_bytes, copy_bytes, threads>;
    static constexpr int depth = row_bytes / sizeof(T);

    const Gather& g;
    const Phase &rows, &columns;
    const T *source, *filter;
    int pixel[Source::count];  // of tap (0, 0), channel 0, relative to `source`: may lie outside, and is not read then
    int h[Source::count], w[Source::count];
    int place, filters, length, tap_columns;  // place in a slab, filters from this thread's first on
    Digits position, step;  // channel, tap column, tap row

    __device__ __forceinline__ GatherLoader(const Gather& gather, const Phase& r, const Phase& s, const T* x,
                                            const T* weight, uint32 row0, int column0, uint32 slab)
        : g(gather), rows(r), columns(s) {
        const uint32 total = uint32(g.count) * rows.extent * columns.extent;
        const int first_image = digits(row0, columns.extent, rows.extent).high;
        source = x + int64(first_image) * g.rows.source * g.columns.source * g.channels;
#pragma unroll
        for (int i = 0; i < Source::count; i++) {
            uint32 row = row0 + Source::first_row() + i * Source::step;
            Digits at = digits(row, columns.extent, rows.extent);
            h[i] = at.middle * g.rows.step + rows.first;
            w[i] = at.low * g.columns.step + columns.first;
            pixel[i] = (((at.high - first_image) * g.rows.source + h[i]) * g.columns.source + w[i]) * g.channels;
            if (row >= total) h[i] = -(1 << 30);
        }
        length = g.rows.filter * g.columns.filter * g.channels;
        filters = g.filters - column0 - Filter::first_row();
        filter = weight + int64(column0 + Filter::first_row()) * length;
        tap_columns = columns.taps > 0 ? columns.taps : 1;
        step = digits(depth, g.channels, tap_columns);
        position = digits(slab * depth + Source::byte() / sizeof(T), g.channels, tap_columns);
        place = swizzled<row_bytes>(Source::first_row(), Source::byte() & ~15) + (Source::byte() & 15);
        hold(place);
        hold(source);
        hold(filter);
        hold(filters);
    }

    // Starts the copies of the next slab: source to `slab`, filters behind it.
    __device__ __forceinline__ void load(uint8* slab) {
        const bool inside = position.high < rows.taps;
        const int dh = position.high * g.rows.tap_step, dw = position.middle * g.columns.tap_step;
        const int offset = (dh * g.columns.source + dw) * g.channels + position.low;
        uint8* target = slab + place;
#pragma unroll
        for (int i = 0; i < Source::count; i++) {
            bool valid = inside & (uint32(h[i] + dh) < uint32(g.rows.source)) &
                         (uint32(w[i] + dw) < uint32(g.columns.source));
            copy_async<copy_bytes>(target + i * Source::step * row_bytes, source + (pixel[i] + offset), valid);
        }
        const int tap = (rows.filter_first + position.high * g.rows.filter_step) * g.columns.filter +
                        columns.filter_first + position.middle * g.columns.filter_step;
        const int from = tap * g.channels + position.low;
        target += tall * row_bytes;
#pragma unroll
        for (int i = 0; i < Filter::count; i++) {
            bool valid = inside & (i * Filter::step < filters);
            copy_async<copy_bytes>(target + i * Filter::step * row_bytes, filter + (from + i * Filter::step * length),
                                   valid);
        }
        advance(position, step, g.channels, tap_columns);
    }

    static_assert(Source::step % 8 == 0 && Filter::step % 8 == 0, "rows of a thread must be swizzled alike");
};

// Where a lane finds its fragments of the first step in a slab, source and filter.
template <int row_bytes> __device__ __forceinline__ int source_place(int first_row) {
    const int lane = threadIdx.x % 32;
    return swizzled<row_bytes>(first_row + lane % 16, lane / 16 * 16);
}
template <int row_bytes> __device__ __forceinline__ int filter_place(int first_row) {
    const int lane = threadIdx.x % 32;
    return swizzled<row_bytes>(first_row + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 16);
}

// Loads the fragments of the products' step `part`: 32 bytes of the reduction, whose number is among the swizzled bits.
template <int row_bytes, typename T, int tall, int wide>
__device__ __forceinline__ void load_fragments(WarpTile<T, tall, wide>& tile, int which, const uint8* slab, int source,
                                               int filter, int part) {
    const uint8* row = slab + (source ^ part * 32);
#pragma unroll
    for (int i = 0; i < tall; i++) {
        load_matrices(tile.a[which][i], row + i * 16 * row_bytes);
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int e = 0; e < 4; e++) tile.a[which][i][e] = rounded_to_tf32(tile.a[which][i][e]);
        }
    }
    row = slab + (filter ^ part * 32);
#pragma unroll
    for (int j = 0; j < wide; j += 2) {
        uint32 d[4];
        load_matrices(d, row + j * 8 * row_bytes);
        tile.b[which][j][0] = d[0];
        tile.b[which][j][1] = d[1];
        tile.b[which][j + 1][0] = d[2];
        tile.b[which][j + 1][1] = d[3];
    }
}

// Where finished sums go: outputs with bias and activation, or partial sums.
template <typename T> struct Destination {
    T* out;
    float* partial;  // of this split, or null
    const float* bias;
    int filters, activation;

    // Stores `size` neighbouring sums; `at` is the first one's place in the output, `column` its filter.
    template <int size> __device__ __forceinline__ void store(const float* sums, int64 at, int column) const {
        float value[size];
        const bool whole = filters % size == 0;
#pragma unroll
        for (int e = 0; e < size; e++) {
            float shift = bias != nullptr && column + e < filters ? bias[column + e] : 0.0f;
            value[e] = partial != nullptr ? sums[e] : activate(sums[e] + shift, activation);
        }
        if (partial != nullptr) {
            put<size>(partial + at, value, column, whole);
        } else {
            put<size>(out + at, value, column, whole);
        }
    }

    template <int size, typename U>
    __device__ __forceinline__ void put(U* to, const float* value, int column, bool whole) const {
        if (whole) {
            constexpr int lot = Vector<U>::size;
#pragma unroll
            for (int e = 0; e < size; e += lot) {
                Vector<U> v;
#pragma unroll
                for (int f = 0; f < lot; f++) v.element[f] = from_float<U>(value[e + f]);
                *reinterpret_cast<Vector<U>*>(to + e) = v;
            }
        } else {
#pragma unroll
            for (int e = 0; e < size; e++)
                if (column + e < filters) to[e] = from_float<U>(value[e]);
        }
    }
};

// Stores a block's sums, sixteen rows of each warp at a time: through shared memory, so that stores are wide.
template <typename T, int tall, int wide, int warp_rows>
__device__ __forceinline__ void store_tile(const WarpTile<T, tall, wide>& tile, uint8* shared, const int64* places,
                                           int column0, const Destination<T>& to) {
    constexpr int width = wide * 8, pitch = width + 8, size = Vector<T>::size, across = width / size;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* own = reinterpret_cast<float*>(shared) + warp * 16 * pitch;
    column0 += warp / warp_rows * width;
    places += warp % warp_rows * tall * 16;
#pragma unroll
    for (int i = 0; i < tall; i++) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < wide; j++) {
            float* cell = own + lane / 4 * pitch + j * 8 + lane % 4 * 2;
            cell[0] = tile.sum[i][j][0];
            cell[1] = tile.sum[i][j][1];
            cell[8 * pitch] = tile.sum[i][j][2];
            cell[8 * pitch + 1] = tile.sum[i][j][3];
        }
        __syncthreads();
#pragma unroll
        for (int index = lane; index < 16 * across; index += 32) {
            int row = index / across, column = column0 + index % across * size;
            int64 place = places[i * 16 + row];
            if (place >= 0 && column < to.filters)
                to.template store<size>(own + row * pitch + index % across * size, place + column, column);
        }
    }
}

// Places of the first filter's outputs of each row of a tile; -1 where there is no such pixel.
__device__ __forceinline__ void place_rows(const Gather& g, const Phase& rows, const Phase& columns, uint32 row0,
                                           int tall, int64* places) {
    const uint32 total = uint32(g.count) * rows.extent * columns.extent;
    for (int i = threadIdx.x; i < tall; i += blockDim.x) {
        Digits pixel = digits(row0 + i, columns.extent, rows.extent);
        int64 line = int64(pixel.high) * g.rows.outputs + rows.index + pixel.middle * g.rows.phases;
        int64 place = (line * g.columns.outputs + columns.index + pixel.low * g.columns.phases) * g.filters;
        places[i] = row0 + i < total ? place : -1;
    }
}

// One tile of `tall` pixels x `wide` filters; grid: (tiles, 1, phases * splits), tiles of filters fastest.
template <typename T, int tall, int wide, int row_bytes, int warp_rows, int warp_columns, int stages, int copy_bytes>
__device__ __forceinline__ void gather_tile(const T* x, const T* weight, const float* bias, T* out, float* partials,
                                            const Gather& g, int activation) {
    constexpr int threads = warp_rows * warp_columns * 32, slab_bytes = (tall + wide) * row_bytes;
    constexpr int parts = row_bytes / 32, warp_tall = tall / warp_rows, warp_wide = wide / warp_columns;
    DYNAMIC_SHARED(shared);
    // The last phases have the most taps if padding is half the filter: they begin first.
    const int split = blockIdx.z % g.splits, phase = (gridDim.z - 1 - blockIdx.z) / g.splits;
    const Phase rows(g.rows, phase / g.columns.phases), columns(g.columns, phase % g.columns.phases);
    const uint32 tiles = (g.filters + wide - 1) / wide;
    const uint32 row0 = blockIdx.x / tiles * tall, column0 = blockIdx.x % tiles * wide;
    if (row0 >= uint32(g.count) * rows.extent * columns.extent) return;

    using Loader = GatherLoader<T, tall, wide, row_bytes, threads, copy_bytes>;
    const int slabs = (rows.taps * columns.taps * g.channels + Loader::depth - 1) / Loader::depth;
    const int begin = int64(slabs) * split / g.splits, count = int64(slabs) * (split + 1) / g.splits - begin;
    Loader loader(g, rows, columns, x, weight, row0, column0, begin);
    int64* places = reinterpret_cast<int64*>(shared + stages * slab_bytes);
    place_rows(g, rows, columns, row0, tall, places);

    const int warp = threadIdx.x / 32;
    int source_at = source_place<row_bytes>(warp % warp_rows * warp_tall);
    int filter_at = filter_place<row_bytes>(tall + warp / warp_rows * warp_wide);
    hold(source_at);
    hold(filter_at);
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
    load_fragments<row_bytes>(tile, 0, shared, source_at, filter_at, 0);
    for (int slab = 0; slab < count; slab++) {
#pragma unroll
        for (int part = 0; part < parts; part++) {
            if (part == parts - 1) {
                copy_wait<stages - 2>();
                __syncthreads();
                read = read + slab_bytes == stages * slab_bytes ? 0 : read + slab_bytes;
            }
            load_fragments<row_bytes>(tile, (part + 1) % 2, shared + read, source_at, filter_at, (part + 1) % parts);
            if (part == 0) {
                if (slab + stages - 1 < count) loader.load(shared + write);
                copy_commit();
                write = write + slab_bytes == stages * slab_bytes ? 0 : write + slab_bytes;
            }
            tile.multiply(part % 2);
        }
    }
    copy_wait<0>();
    const int64 outputs = int64(g.count) * g.rows.outputs * g.columns.outputs * g.filters;
    float* partial = partials == nullptr ? nullptr : partials + split * outputs;
    store_tile<T, warp_tall / 16, warp_wide / 8, warp_rows>(
        tile, shared, places, column0, {out, partial, bias, g.filters, activation});
}

#define GATHER(name, T, tall, wide, row_bytes, warp_rows, warp_columns, stages, copy_bytes)                           \
    extern "C" __global__ void __launch_bounds__(warp_rows* warp_columns * 32)                                         \
        conv2d_forward_mma_##name(const T* x, const T* weight, const float* bias, T* out, float* partials, Gather g,  \
                                  int activation) {                                                                   \
        gather_tile<T, tall, wide, row_bytes, warp_rows, warp_columns, stages, copy_bytes>(x, weight, bias, out,      \
                                                                                           partials, g, activation); \
    }

GATHER(256x128_bf16, bf16, 256, 128, 64, 4, 2, 4, 16)
GATHER(128x128_bf16, bf16, 128, 128, 64, 2, 2, 4, 16)
GATHER(128x128_deep_bf16, bf16, 128, 128, 128, 2, 4, 3, 16)
GATHER(256x64_bf16, bf16, 256, 64, 64, 8, 1, 3, 16)
GATHER(128x64_bf16, bf16, 128, 64, 64, 2, 2, 4, 16)
GATHER(64x64_bf16, bf16, 64, 64, 128, 2, 2, 3, 16)
GATHER(128x64_narrow_bf16, bf16, 128, 64, 64, 4, 1, 4, 8)
GATHER(256x128_tf32, float, 256, 128, 64, 4, 2, 4, 16)
GATHER(128x128_tf32, float, 128, 128, 64, 2, 2, 4, 16)
GATHER(128x128_deep_tf32, float, 128, 128, 128, 2, 4, 3, 16)
GATHER(256x64_tf32, float, 256, 64, 64, 8, 1, 3, 16)
GATHER(128x64_tf32, float, 128, 64, 64, 2, 2, 4, 16)
GATHER(64x64_tf32, float, 64, 64, 128, 2, 2, 3, 16)
GATHER(128x64_narrow_tf32, float, 128, 64, 64, 4, 1, 4, 4)
