// architectures: 90a
// Convolutions and their gradients as implicit matrix products on Hopper: conv2d_wgmma.cuh with what to load and where
// to store. The copy engine's im2col mode walks over the images, and puts zeros where a window reaches beyond them.
#include "conv2d_wgmma.cuh"

// Rows of a product that are pixels: a grid of `height` x `width` base pixels an image; that of row (image, i, j) is
// (image, corner_h + i stride_h, corner_w + j stride_w).
struct Pixels {
    int rows, height, width, stride_h, stride_w, corner_h, corner_w;

    __device__ __forceinline__ void split(int row, int& image, int& i, int& j) const {
        j = row % width;
        i = row / width % height;
        image = row / width / height;
    }
};

// Windows: tap (i, j) reads the base pixel moved by (i step_h, j step_w) and filter tap first + i tap_h + j tap_w.
// `chunks`: steps that the channels of one tap take.
struct Windows {
    int height, width, step_h, step_w, first, tap_h, tap_w, chunks;
};

// y [image][i][j][column], by strides in elements from `out_first` on; `dense`: pixels follow one another.
struct Forward {
    int64 out_first, out_split, out_image, out_row, out_pixel;
    Pixels pixels;
    Windows windows;
    int columns, splits, activation, dense;
};

// grad_weight [row][tap][channel]; a unit is 64 channels of a tap, in the order of taps. Channels are a multiple of 8.
struct Weight {
    int64 out_split;
    Pixels pixels;
    int rows, channels, taps_w, taps, step_h, step_w, splits;
};

__device__ const float NO_BIAS = 0.0f;

// One tile of the output and its part of the summed dimension, columns fastest: blocks that run together share rows.
struct Item {
    int row, column, split, first, steps;

    __device__ __forceinline__ Item(int64 item, int tile_rows, int tile_columns, int splits, int all_steps) {
        column = item % tile_columns;
        row = item / tile_columns % tile_rows;
        split = item / tile_columns / tile_rows;
        first = static_cast<int64>(all_steps) * split / splits;
        steps = static_cast<int64>(all_steps) * (split + 1) / splits - first;
    }
};

template <typename Tile>
__device__ __forceinline__ void load_forward(unsigned char* shared, Ring& ring, const TensorMap* images,
                                             const TensorMap* filters, const Item& item, const Forward& f) {
    if (item.steps == 0) return;  // no tap reaches these pixels
    constexpr int pieces = Tile::M / 128;
    int image[pieces], h[pieces], w[pieces];
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
        int i, j;
        f.pixels.split(item.row * Tile::M + piece * 128, image[piece], i, j);
        h[piece] = f.pixels.corner_h + i * f.pixels.stride_h;
        w[piece] = f.pixels.corner_w + j * f.pixels.stride_w;
    }
    int chunk = item.first % f.windows.chunks, tap = item.first / f.windows.chunks;
    int i = tap / f.windows.width, j = tap % f.windows.width;
    for (int step = 0; step < item.steps; ++step) {
        barrier_wait(ring.empty + ring.stage, ring.phase ^ 1);
        uint64* full = ring.full + ring.stage;
        unsigned char* stage = shared + ring.stage * Tile::STAGE_BYTES;
        barrier_arrive_expect(full, Tile::STAGE_BYTES);
#pragma unroll
        for (int piece = 0; piece < pieces; ++piece)
            load_im2col(stage + piece * 128 * ROW, images, full, chunk * Tile::STEP, w[piece], h[piece], image[piece],
                        j * f.windows.step_w, i * f.windows.step_h);
        load_tiled_3d(stage + Tile::A_BYTES, filters, full, chunk * Tile::STEP,
                      f.windows.first + i * f.windows.tap_h + j * f.windows.tap_w, item.column * Tile::N);
        ring.next<Tile::STAGES>();
        if (++chunk == f.windows.chunks) {
            chunk = 0;
            if (++j == f.windows.width) {
                j = 0;
                ++i;
            }
        }
    }
}

template <typename Tile, typename Out>
__device__ __forceinline__ void store_forward(const float (&sums)[Tile::BLOCKS][Tile::N / 2], unsigned char* shared,
                                              int group, const float* bias, Out* y, const Item& item,
                                              const Forward& f) {
    constexpr int width = SLAB / sizeof(Out) < Tile::N ? SLAB / sizeof(Out) : Tile::N;
    int first = item.column * Tile::N;
    y += f.out_first + item.split * f.out_split + first;
    auto row = [&](int r, int slab) -> Out* {
        int m = item.row * Tile::M + r;
        if (m >= f.pixels.rows) return nullptr;
        if (f.dense) return y + m * f.out_pixel + slab * width;
        int image, i, j;
        f.pixels.split(m, image, i, j);
        return y + image * f.out_image + i * f.out_row + j * f.out_pixel + slab * width;
    };
    auto columns = [&](int slab) { return f.columns - first - slab * width; };
    bool aligned = f.columns % (16 / sizeof(Out)) == 0 && reinterpret_cast<uint64>(y) % 16 == 0;
    if (bias == nullptr && f.activation == IDENTITY) {
        store<Tile, Out>(sums, shared, group, aligned, [](float sum, int) { return sum; }, row, columns);
        return;
    }
    float low = f.activation == IDENTITY ? 1.0f : 0.1f;
    bool relu = f.activation == RELU;
    const float* shifts = bias == nullptr ? &NO_BIAS : bias;
    int last = bias == nullptr ? 0 : f.columns - 1;
    auto finish = [&](float sum, int column) {  // as `activate`, in selections instead of branches
        float x = sum + shifts[min(first + column, last)];
        float below = relu ? (x == x ? 0.0f : x) : low * x;
        return x > 0.0f ? x : below;
    };
    store<Tile, Out>(sums, shared, group, aligned, finish, row, columns);
}

template <typename Tile, typename Out>
__device__ __forceinline__ void forward(const TensorMap* images, const TensorMap* filters, const float* bias, Out* y,
                                        const Forward& f) {
    DYNAMIC_SHARED(shared);
    Ring ring = open_ring<Tile>(shared);
    int tile_rows = ceil_div(f.pixels.rows, Tile::M), tile_columns = ceil_div(f.columns, Tile::N);
    int steps = f.windows.height * f.windows.width * f.windows.chunks;
    int64 items = static_cast<int64>(tile_rows) * tile_columns * f.splits;
    if (threadIdx.x < GROUP) {
        registers_decrease<40>();
        if (threadIdx.x == 0) {
            prefetch_map(images);
            prefetch_map(filters);
            for (int64 i = blockIdx.x; i < items; i += gridDim.x)
                load_forward<Tile>(shared, ring, images, filters, Item(i, tile_rows, tile_columns, f.splits, steps), f);
        }
    } else {
        registers_increase<232>();
        int group = threadIdx.x / GROUP - 1;
        for (int64 i = blockIdx.x; i < items; i += gridDim.x) {
            Item item(i, tile_rows, tile_columns, f.splits, steps);
            float sums[Tile::BLOCKS][Tile::N / 2];
            consume<Tile, 0>(sums, ring, shared, group, item.steps);
            store_forward<Tile>(sums, shared, group, bias, y, item, f);
        }
    }
}

template <typename Tile>
__device__ __forceinline__ void load_weight(unsigned char* shared, Ring& ring, const TensorMap* images,
                                            const TensorMap* grads, const Item& item, const Weight& g) {
    int chunks = (g.channels + 63) / 64, first = item.column * (Tile::N / 64);
    int units = min(Tile::N / 64, g.taps * chunks - first);
    for (int step = item.first; step < item.first + item.steps; ++step) {
        int image, i, j;
        g.pixels.split(step * 64, image, i, j);
        int h = g.pixels.corner_h + i * g.pixels.stride_h, w = g.pixels.corner_w + j * g.pixels.stride_w;
        barrier_wait(ring.empty + ring.stage, ring.phase ^ 1);
        uint64* full = ring.full + ring.stage;
        unsigned char* stage = shared + ring.stage * Tile::STAGE_BYTES;
        barrier_arrive_expect(full, Tile::A_BYTES + units * Tile::CHUNK);
#pragma unroll
        for (int block = 0; block < Tile::M / 64; ++block)
            load_tiled_2d(stage + block * Tile::CHUNK, grads, full, item.row * Tile::M + block * 64, step * 64);
        int chunk = first % chunks, tap = first / chunks;
        for (int unit = 0; unit < units; ++unit) {
            load_im2col(stage + Tile::A_BYTES + unit * Tile::CHUNK, images, full, chunk * 64, w, h, image,
                        tap % g.taps_w * g.step_w, tap / g.taps_w * g.step_h);
            if (++chunk == chunks) {
                chunk = 0;
                ++tap;
            }
        }
        ring.next<Tile::STAGES>();
    }
}

template <typename Tile>
__device__ __forceinline__ void store_weight(const float (&sums)[Tile::BLOCKS][Tile::N / 2], unsigned char* shared,
                                             int group, float* out, const Item& item, const Weight& g) {
    int chunks = (g.channels + 63) / 64, first = item.column * (Tile::N / 64);
    int64 pitch = static_cast<int64>(g.taps) * g.channels;
    out += item.split * g.out_split;
    auto finish = [](float sum, int) { return sum; };
    auto row = [&](int r, int slab) -> float* {
        int m = item.row * Tile::M + r, unit = first + slab;
        if (m >= g.rows) return nullptr;
        return out + m * pitch + unit / chunks * g.channels + unit % chunks * 64;
    };
    auto columns = [&](int slab) {
        int unit = first + slab;
        return unit < g.taps * chunks ? g.channels - unit % chunks * 64 : 0;
    };
    store<Tile, float>(sums, shared, group, reinterpret_cast<uint64>(out) % 16 == 0, finish, row, columns);
}

template <typename Tile>
__device__ __forceinline__ void weight(const TensorMap* images, const TensorMap* grads, float* out, const Weight& g) {
    DYNAMIC_SHARED(shared);
    Ring ring = open_ring<Tile>(shared);
    int units = g.taps * ((g.channels + 63) / 64);
    int tile_rows = ceil_div(g.rows, Tile::M), tile_columns = ceil_div(units, Tile::N / 64);
    int steps = ceil_div(g.pixels.rows, 64);
    int64 items = static_cast<int64>(tile_rows) * tile_columns * g.splits;
    if (threadIdx.x < GROUP) {
        registers_decrease<40>();
        if (threadIdx.x == 0) {
            prefetch_map(images);
            prefetch_map(grads);
            for (int64 i = blockIdx.x; i < items; i += gridDim.x)
                load_weight<Tile>(shared, ring, images, grads, Item(i, tile_rows, tile_columns, g.splits, steps), g);
        }
    } else {
        registers_increase<232>();
        int group = threadIdx.x / GROUP - 1;
        for (int64 i = blockIdx.x; i < items; i += gridDim.x) {
            Item item(i, tile_rows, tile_columns, g.splits, steps);
            float sums[Tile::BLOCKS][Tile::N / 2];
            consume<Tile, 1>(sums, ring, shared, group, item.steps);
            store_weight<Tile>(sums, shared, group, out, item, g);
        }
    }
}

// y[i] = activation(sum over s of partial[s][i] + bias[i % columns]), in the order of s.
template <typename Out>
__device__ __forceinline__ void sum_splits(const float* partial, const float* bias, Out* y, int64 size, int splits,
                                           int columns, int activation) {
    for (int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
         i += static_cast<int64>(gridDim.x) * blockDim.x) {
        float sum = 0.0f;
#pragma unroll 4
        for (int split = 0; split < splits; ++split) sum += partial[split * size + i];
        y[i] = from_float<Out>(activate(bias == nullptr ? sum : sum + bias[i % columns], activation));
    }
}

#define FORWARD(name, in, out, blocks, n, stages)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                   \
        name(const __grid_constant__ TensorMap images, const __grid_constant__ TensorMap filters,              \
             const float* bias, out* y, Forward f) {                                                           \
        forward<Tile<in, blocks, n, stages>>(&images, &filters, bias, y, f);                                   \
    }
#define FORWARD_TYPES(tile, blocks, n, stages)                                 \
    FORWARD(conv2d_forward_wgmma_##tile##_bf16, bf16, bf16, blocks, n, stages)  \
    FORWARD(conv2d_partial_wgmma_##tile##_bf16, bf16, float, blocks, n, stages) \
    FORWARD(conv2d_forward_wgmma_##tile##_tf32, float, float, blocks, n, stages)
FORWARD_TYPES(128x256, 1, 256, 4)
FORWARD_TYPES(128x128, 1, 128, 6)
FORWARD_TYPES(128x64, 1, 64, 8)
FORWARD_TYPES(256x128, 2, 128, 4)

#define WEIGHT(tile, blocks, n, stages)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                   \
        conv2d_weight_wgmma_##tile##_bf16(const __grid_constant__ TensorMap images,                            \
                                          const __grid_constant__ TensorMap grads, float* out, Weight g) {     \
        weight<Tile<bf16, blocks, n, stages>>(&images, &grads, out, g);                                        \
    }
WEIGHT(128x256, 1, 256, 4)
WEIGHT(128x192, 1, 192, 4)
WEIGHT(128x128, 1, 128, 6)
WEIGHT(256x128, 2, 128, 4)

#define SUM(type, out)                                                                                          \
    extern "C" __global__ void conv2d_sum_wgmma_##type(const float* partial, const float* bias, out* y, int64 size, \
                                                       int splits, int columns, int activation) {               \
        sum_splits(partial, bias, y, size, splits, columns, activation);                                        \
    }
SUM(f32, float)
SUM(bf16, bf16)
