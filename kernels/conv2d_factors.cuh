// Factors of the products of conv2d_simt.cu: which element of an image or of filters stands at a row, column and depth.
#pragma once
#include "common.cuh"

#define DEPTH 8    // steps of depth between barriers
#define PADDING 4  // floats behind each row in shared memory, so that transposing stores spread over the banks

// One launch; hpcnn.ops.cuda.simt has the same in NumPy. "Read" is the image that taps are applied to (x, or for the
// input pass grad_output), "other" the channels at the other side of the filters. A place (i, j) of the grid reads at
// tap (r, s) the pixel (start_h + i * scale_h + r * step_h, ...); it is output pixel (origin_h + i * spread_h, ...).
struct Product {
    int samples, rows, columns;                    // grid of places
    int height, width, channels, part;             // read image; its channels in all and of one group
    int other_channels, other_part;
    int taps_r, taps_s, first_r, first_s, every_r, every_s, filter_r, filter_s;  // taps taken, of those of the filter
    int scale_h, scale_w, start_h, start_w, step_h, step_w;
    int out_height, out_width, origin_h, origin_w, spread_h, spread_w;
    int splits;  // parts of the depth; blockIdx.z is group * splits + split
};

template <typename T, int count> struct alignas(sizeof(T) * count) Vector {
    T at[count];
};

template <typename T, int count> __device__ __forceinline__ bool aligned(const T* p) {
    return reinterpret_cast<uint64>(p) % (sizeof(T) * count) == 0;
}

// Read a vector, element by element where it is not `whole` (aligned).
template <typename T, int count>
__device__ __forceinline__ Vector<T, count> read(const T* p, bool valid, bool whole) {
    Vector<T, count> v;
#pragma unroll
    for (int i = 0; i < count; ++i) v.at[i] = from_float<T>(0.0f);
    if (valid && whole) v = *reinterpret_cast<const Vector<T, count>*>(p);
    if (valid && !whole) {
#pragma unroll
        for (int i = 0; i < count; ++i) v.at[i] = p[i];
    }
    return v;
}

// A number in mixed radix, `low` running fastest: (tap row, tap column, channel), or (sample, row, column) of a pixel.
struct Counter {
    int low, mid, high;
};

__device__ __forceinline__ Counter counter(int64 number, int low, int mid) {
    Counter at;
    int64 rest = number / low;
    at.low = static_cast<int>(number - rest * low);
    at.high = static_cast<int>(rest / mid);
    at.mid = static_cast<int>(rest - static_cast<int64>(at.high) * mid);
    return at;
}

__device__ __forceinline__ void advance(Counter& at, int by, int low, int mid) {
    at.low += by;
    while (at.low >= low) {
        at.low -= low;
        if (++at.mid == mid) {
            at.mid = 0;
            ++at.high;
        }
    }
}

// What a thread brings of each eight steps of a factor: `count` vectors, along depth or across it. `load` starts the
// reads, `store` puts what came into a tile [DEPTH][TILE + PADDING].
//
// Along depth: a thread has one place of the depth, and several rows.
template <typename T, int TILE, int THREADS, int V> struct Along {
    static constexpr int lanes = DEPTH / V, count = TILE * lanes / THREADS;
    Vector<T, V> raw[count];

    static __device__ __forceinline__ int lane() { return threadIdx.x % lanes * V; }
    static __device__ __forceinline__ int row(int i) { return threadIdx.x / lanes + i * (THREADS / lanes); }

    template <typename Rounded> __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
        for (int i = 0; i < count; ++i) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                tile[(lane() + j) * (TILE + PADDING) + row(i)] = to_float(from_float<Rounded>(to_float(raw[i].at[j])));
            }
        }
    }
};

// Across: a thread has one place across, and several steps of the depth.
template <typename T, int TILE, int THREADS, int V> struct Across {
    static constexpr int lanes = TILE / V, count = TILE * DEPTH / V / THREADS, step = THREADS / lanes;
    Vector<T, V> raw[count];

    static __device__ __forceinline__ int lane() { return threadIdx.x % lanes * V; }
    static __device__ __forceinline__ int row(int i) { return threadIdx.x / lanes + i * step; }

    template <typename Rounded> __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
        for (int i = 0; i < count; ++i) {
            Vector<float, V> v;
#pragma unroll
            for (int j = 0; j < V; ++j) v.at[j] = to_float(from_float<Rounded>(to_float(raw[i].at[j])));
            // Counted in vectors, so that the compiler sees the alignment.
            int at = row(i) * ((TILE + PADDING) / V) + threadIdx.x % lanes;
            reinterpret_cast<Vector<float, V>*>(tile)[at] = v;
        }
    }
};

// Left factor of forward and input: the pixels that each place reads.
template <typename T, int TILE, int THREADS, int V> struct Pixels : Along<T, TILE, THREADS, V> {
    typedef Along<T, TILE, THREADS, V> Base;
    const T* image[Base::count];
    int down[Base::count], across[Base::count];
    Counter at;
    bool whole;

    __device__ __forceinline__ Pixels(const T* x, const Product& g, int group, int64 first, int64 begin) {
        whole = aligned<T, V>(x);
        at = counter(begin + Base::lane(), g.part, g.taps_s > 0 ? g.taps_s : 1);
#pragma unroll
        for (int i = 0; i < Base::count; ++i) {
            Counter place = counter(first + Base::row(i), g.columns, g.rows);
            bool inside = place.high < g.samples;
            down[i] = inside ? g.start_h + place.mid * g.scale_h : -(1 << 30);
            across[i] = g.start_w + place.low * g.scale_w;
            int64 sample = inside ? place.high : 0;
            image[i] = x + sample * g.height * g.width * g.channels + static_cast<int64>(group) * g.part;
        }
    }

    __device__ __forceinline__ void load(const Product& g) {
        bool inside = at.high < g.taps_r;
        int below = at.high * g.step_h, beside = at.mid * g.step_w;
#pragma unroll
        for (int i = 0; i < Base::count; ++i) {
            int h = down[i] + below, w = across[i] + beside;
            bool valid = inside && h >= 0 && h < g.height && w >= 0 && w < g.width;
            const T* from = image[i] + static_cast<int64>(h * g.width + w) * g.channels + at.low;
            this->raw[i] = read<T, V>(from, valid, whole);
        }
        advance(at, DEPTH, g.part, g.taps_s);
    }
};

// Right factor of forward: filters, as they lie.
template <int TILE, int THREADS, int V> struct Filters : Along<float, TILE, THREADS, V> {
    typedef Along<float, TILE, THREADS, V> Base;
    const float* from;
    int64 depth, at;
    int left;
    bool whole;

    __device__ __forceinline__ Filters(const float* w, const Product& g, int group, int64 first, int64 begin) {
        whole = aligned<float, V>(w);
        depth = static_cast<int64>(g.filter_r) * g.filter_s * g.part;
        at = begin + Base::lane();
        int64 row = first + Base::row(0);
        left = static_cast<int>(g.other_part - row);
        from = w + (static_cast<int64>(group) * g.other_part + row) * depth;
    }

    __device__ __forceinline__ void load(const Product&) {
#pragma unroll
        for (int i = 0; i < Base::count; ++i) {
            const int step = i * (THREADS / Base::lanes);
            this->raw[i] = read<float, V>(from + step * depth + at, at < depth && step < left, whole);
        }
        at += DEPTH;
    }
};

// Right factor of input: filters, their channels side by side.
template <int TILE, int THREADS, int V> struct FiltersTransposed : Across<float, TILE, THREADS, V> {
    typedef Across<float, TILE, THREADS, V> Base;
    const float* from;
    Counter at;
    bool inside, whole;

    __device__ __forceinline__ FiltersTransposed(const float* w, const Product& g, int group, int64 first,
                                                 int64 begin) {
        whole = aligned<float, V>(w);
        at = counter(begin + Base::row(0), g.part, g.taps_s > 0 ? g.taps_s : 1);
        int64 channel = first + Base::lane();
        inside = channel < g.other_part;
        from = w + static_cast<int64>(group) * g.part * g.filter_r * g.filter_s * g.other_part + channel;
    }

    __device__ __forceinline__ void load(const Product& g) {
#pragma unroll
        for (int i = 0; i < Base::count; ++i) {
            Counter tap = at;
            if (i > 0) advance(tap, i * Base::step, g.part, g.taps_s);
            int r = g.first_r + tap.high * g.every_r, s = g.first_s + tap.mid * g.every_s;
            int64 row = (static_cast<int64>(tap.low) * g.filter_r + r) * g.filter_s + s;
            this->raw[i] = read<float, V>(from + row * g.other_part, inside && tap.high < g.taps_r, whole);
        }
        advance(at, DEPTH, g.part, g.taps_s);
    }
};

// Left factor of weight: gradients of output pixels, filters side by side.
template <typename T, int TILE, int THREADS, int V> struct Gradients : Across<T, TILE, THREADS, V> {
    typedef Across<T, TILE, THREADS, V> Base;
    const T* from;
    int64 left;  // pixels from here on
    bool inside, whole;

    __device__ __forceinline__ Gradients(const T* grad, const Product& g, int group, int64 first, int64 begin) {
        whole = aligned<T, V>(grad);
        int64 filter = first + Base::lane(), pixel = begin + Base::row(0);
        inside = filter < g.other_part;
        left = static_cast<int64>(g.samples) * g.rows * g.columns - pixel;
        from = grad + pixel * g.other_channels + static_cast<int64>(group) * g.other_part + filter;
    }

    __device__ __forceinline__ void load(const Product& g) {
#pragma unroll
        for (int i = 0; i < Base::count; ++i) {
            const int step = i * Base::step;
            const T* pixel = from + static_cast<int64>(step) * g.other_channels;
            this->raw[i] = read<T, V>(pixel, inside && step < left, whole);
        }
        from += static_cast<int64>(DEPTH) * g.other_channels;
        left -= DEPTH;
    }
};

// Right factor of weight: what each output pixel reads at a tap and channel.
template <typename T, int TILE, int THREADS, int V> struct PixelsTransposed : Across<T, TILE, THREADS, V> {
    typedef Across<T, TILE, THREADS, V> Base;
    const T* from;
    int below, beside;
    Counter at;
    bool inside, whole;

    __device__ __forceinline__ PixelsTransposed(const T* x, const Product& g, int group, int64 first, int64 begin) {
        whole = aligned<T, V>(x);
        Counter tap = counter(first + Base::lane(), g.part, g.taps_s);
        inside = tap.high < g.taps_r;
        below = g.start_h + tap.high * g.step_h;
        beside = g.start_w + tap.mid * g.step_w;
        from = x + static_cast<int64>(group) * g.part + tap.low;
        at = counter(begin + Base::row(0), g.columns, g.rows);
    }

    __device__ __forceinline__ void load(const Product& g) {
#pragma unroll
        for (int i = 0; i < Base::count; ++i) {
            Counter place = at;
            if (i > 0) advance(place, i * Base::step, g.columns, g.rows);
            int h = below + place.mid * g.scale_h, w = beside + place.low * g.scale_w;
            bool valid = inside && place.high < g.samples && h >= 0 && h < g.height && w >= 0 && w < g.width;
            int64 pixel = (static_cast<int64>(place.high) * g.height + h) * g.width + w;
            this->raw[i] = read<T, V>(from + pixel * g.channels, valid, whole);
        }
        advance(at, DEPTH, g.columns, g.rows);
    }
};

// Rows of `out`: pixels of forward and input, filters of weight. `offset` is that of the first column.
struct OutPixels {
    static __device__ __forceinline__ int64 rows(const Product& g) {
        return static_cast<int64>(g.samples) * g.rows * g.columns;
    }
    static __device__ __forceinline__ int64 columns(const Product& g) { return g.other_part; }
    static __device__ __forceinline__ int64 depth(const Product& g) {
        return static_cast<int64>(g.taps_r) * g.taps_s * g.part;
    }
    static __device__ __forceinline__ int64 size(const Product& g) {
        return static_cast<int64>(g.samples) * g.out_height * g.out_width * g.other_channels;
    }
    static __device__ __forceinline__ int64 offset(const Product& g, int group, int64 row) {
        Counter place = counter(row, g.columns, g.rows);
        int h = g.origin_h + place.mid * g.spread_h, w = g.origin_w + place.low * g.spread_w;
        int64 pixel = (static_cast<int64>(place.high) * g.out_height + h) * g.out_width + w;
        return pixel * g.other_channels + static_cast<int64>(group) * g.other_part;
    }
};

struct OutFilters {
    static __device__ __forceinline__ int64 rows(const Product& g) { return g.other_part; }
    static __device__ __forceinline__ int64 columns(const Product& g) {
        return static_cast<int64>(g.taps_r) * g.taps_s * g.part;
    }
    static __device__ __forceinline__ int64 depth(const Product& g) { return OutPixels::rows(g); }
    static __device__ __forceinline__ int64 size(const Product& g) { return columns(g) * g.other_channels; }
    static __device__ __forceinline__ int64 offset(const Product& g, int group, int64 row) {
        return (static_cast<int64>(group) * g.other_part + row) * columns(g);
    }
};
