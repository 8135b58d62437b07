// Convolutions and their gradients as implicit matrix products on Hopper: conv2d_wgmma.cuh with what to load and where
// to store. The copy engine's im2col mode walks over the images, and puts zeros where a window reaches beyond them.
#pragma once
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

// y [image][i][j][column], by strides in elements from `out_first` on; `dense`: pixels follow one another;
// `engine`: the copy engine stores them.
struct Forward {
    int64 out_first, out_split, out_image, out_row, out_pixel;
    Pixels pixels;
    Windows windows;
    int columns, splits, activation, dense, engine;
};

// grad_weight [row][tap][channel]; a unit is 64 channels of a tap, in the order of taps. Channels are a multiple of 8.
struct Weight {
    int64 out_split;
    Pixels pixels;
    int rows, channels, taps_w, taps, step_h, step_w, splits;
};

__device__ const float NO_BIAS = 0.0f;

// One tile of the output and its part of the summed dimension, columns fastest: blocks that run together share rows.
// Tiles beyond the last row or column take part in the loads of their cluster, get zeros and store nothing.
struct Item {
    int row, column, split, first, steps;

    // 32 bits: 2^31 tiles would fill any memory. `tile_rows`, `tile_columns` are those of whole clusters.
    template <typename Tile>
    __device__ __forceinline__ Item(uint32 item, uint32 tile_rows, uint32 tile_columns, int splits, int all_steps,
                                    const Place<Tile>& place) {
        uint32 rest = item / tile_columns;
        column = (item - rest * tile_columns) * Tile::ACROSS + place.column;
        split = 0;
        first = 0;
        steps = all_steps;
        if (splits > 1) {
            split = rest / tile_rows;
            rest -= split * tile_rows;
            first = static_cast<int64>(all_steps) * split / splits;
            steps = static_cast<int64>(all_steps) * (split + 1) / splits - first;
        }
        row = rest * Tile::DOWN + place.row;
    }
};

// Call `work(item)` for the tiles of this block, one after the other.
template <typename Tile, typename Work>
__device__ __forceinline__ void for_items(int rows, int columns, int splits, int steps, const Place<Tile>& place,
                                          Work work) {
    uint32 tile_rows = ceil_div(rows, Tile::M * Tile::DOWN), tile_columns = ceil_div(columns, Tile::N * Tile::ACROSS);
    uint32 items = tile_rows * tile_columns * splits;
    for (uint32 i = blockIdx.x / Tile::CLUSTER; i < items; i += gridDim.x / Tile::CLUSTER)
        work(Item(i, tile_rows, tile_columns, splits, steps, place));
}

// What one of the multiplying groups does with the items on which `each(work)` calls `work`: multiply, then call
// `finish(item, sums)`. Groups that alternate begin in turn: the bit of a phase does not tell a stage's next filling
// from the one after it.
template <typename Tile, int transposed, typename Each, typename Finish>
__device__ __forceinline__ void multiply(unsigned char* shared, Ring& ring, const Place<Tile>& place, Each each,
                                         Finish finish) {
    const int group = threadIdx.x / GROUP - 1;
    int turn = group;
    uint32 phase = group ^ 1;  // the first group need not wait for the second
    each([&](const auto& item) {
        if (Tile::ALTERNATE && turn++ % 2 != 0) {
            ring.skip<Tile::STAGES>(item.steps);
            return;
        }
        float sums[Tile::BLOCKS][Tile::N / 2];
        if (Tile::ALTERNATE) barrier_wait(ring.turns + group, phase);
        phase ^= 1;
        consume<Tile, transposed>(sums, ring, shared, Tile::ALTERNATE ? 0 : group, item.steps, place, [&] {
            if (Tile::ALTERNATE && threadIdx.x % 32 == 0) barrier_arrive(ring.turns + (group ^ 1));
        });
        finish(item, sums);
    });
}

template <typename Tile>
__device__ __forceinline__ void load_forward(unsigned char* shared, Ring& ring, const TensorMap* images,
                                             const TensorMap* filters, const Item& item, const Forward& f,
                                             const Place<Tile>& place) {
    if (item.steps == 0) return;  // no tap reaches these pixels
    constexpr int box = Tile::A_PART < 128 ? Tile::A_PART : 128, pieces = Tile::A_PART / box;
    const int part = place.column * Tile::A_PART, filter = place.row * Tile::B_PART;
    int image[pieces], h[pieces], w[pieces];
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
        int i, j;
        f.pixels.split(item.row * Tile::M + part + piece * box, image[piece], i, j);
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
        for (int piece = 0; piece < pieces; ++piece) {
            unsigned char* to = stage + (part + piece * box) * ROW;
            const int c = chunk * Tile::STEP, offset_w = j * f.windows.step_w, offset_h = i * f.windows.step_h;
            if constexpr (Tile::ACROSS > 1)
                multicast_im2col(to, images, full, place.beside(), c, w[piece], h[piece], image[piece], offset_w,
                                 offset_h);
            else
                load_im2col(to, images, full, c, w[piece], h[piece], image[piece], offset_w, offset_h);
        }
        unsigned char* to = stage + Tile::A_BYTES + filter * ROW;
        const int tap = f.windows.first + i * f.windows.tap_h + j * f.windows.tap_w;
        if constexpr (Tile::DOWN > 1)
            multicast_tiled_3d(to, filters, full, place.below(), chunk * Tile::STEP, tap,
                               item.column * Tile::N + filter);
        else
            load_tiled_3d(to, filters, full, chunk * Tile::STEP, tap, item.column * Tile::N);
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
                                              int group, const TensorMap* outputs, const float* bias, Out* y,
                                              const Item& item, const Forward& f) {
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
    float low = f.activation == IDENTITY ? 1.0f : 0.1f;
    bool relu = f.activation == RELU;
    const float* shifts = bias == nullptr ? &NO_BIAS : bias;
    int last = bias == nullptr ? 0 : f.columns - 1;
    auto finish = [&](float sum, int column) {  // as `activate`, in selections instead of branches
        float x = sum + (Tile::ENGINE && bias == nullptr ? 0.0f : shifts[min(first + column, last)]);
        float below = relu ? (x == x ? 0.0f : x) : low * x;
        return x > 0.0f ? x : below;
    };
    if constexpr (Tile::ENGINE) {  // no other path for sums that need nothing: it would cost registers
        if (f.engine) store_by_engine<Tile, Out>(sums, shared, group, outputs, item.row * Tile::M, first, finish);
        else store<Tile, Out>(sums, shared, group, aligned, finish, row, columns);
    } else if (bias == nullptr && f.activation == IDENTITY) {
        store<Tile, Out>(sums, shared, group, aligned, [](float sum, int) { return sum; }, row, columns);
    } else {
        store<Tile, Out>(sums, shared, group, aligned, finish, row, columns);
    }
}

template <typename Tile, typename Out>
__device__ __forceinline__ void forward(const TensorMap* images, const TensorMap* filters, const TensorMap* outputs,
                                        const float* bias, Out* y, const Forward& f) {
    DYNAMIC_SHARED(shared);
    Ring ring = open_ring<Tile>(shared);
    const Place<Tile> place;
    const int steps = f.windows.height * f.windows.width * f.windows.chunks;
    auto each = [&](auto work) {
        for_items<Tile>(f.pixels.rows, f.columns, f.splits, steps, place, work);
    };
    if (threadIdx.x < GROUP) {
        registers_decrease<56>();
        if (threadIdx.x == 0) {
            prefetch_map(images);
            prefetch_map(filters);
            each([&](const Item& item) { load_forward<Tile>(shared, ring, images, filters, item, f, place); });
        }
    } else {
        registers_increase<224>();
        multiply<Tile, 0>(
            shared, ring, place, each, [&](const Item& item, const float(&sums)[Tile::BLOCKS][Tile::N / 2]) {
                store_forward<Tile>(sums, shared, threadIdx.x / GROUP - 1, outputs, bias, y, item, f);
            });
        if (Tile::ENGINE && threadIdx.x % GROUP == 0) store_wait<0>();
    }
    close_ring<Tile>();
}

// `Part`: an Item or what else has row, column, first, steps. Divisions would take longer than a step: all are done
// before the first one, and pixels are counted on from step to step, digit by digit.
template <typename Tile, typename Part>
__device__ __forceinline__ void load_weight(unsigned char* shared, Ring& ring, const TensorMap* images,
                                            const TensorMap* grads, const Part& item, const Weight& g,
                                            const Place<Tile>& place) {
    constexpr int most = Tile::N / 64, blocks = Tile::A_PART / 64;
    const int chunks = (g.channels + 63) / 64, first = item.column * most;
    const int units = max(0, min(most, g.taps * chunks - first));
    uint32 from[most];  // 64 channels number `from >> 16` of a tap at (rows, columns) `from >> 8 & 255`, `from & 255`
#pragma unroll
    for (int unit = 0; unit < most; ++unit) {
        const int tap = (first + unit) / chunks;
        const int chunk = first + unit - tap * chunks;
        from[unit] = static_cast<uint32>(chunk) << 16 | tap / g.taps_w * g.step_h << 8 | tap % g.taps_w * g.step_w;
    }
    int image, i, j, on_image, on_i, on_j;
    g.pixels.split(item.first * 64, image, i, j);
    g.pixels.split(64, on_image, on_i, on_j);
    const int end = (item.first + item.steps) * 64;
    for (int pixel = item.first * 64; pixel < end; pixel += 64) {
        const int h = g.pixels.corner_h + i * g.pixels.stride_h, w = g.pixels.corner_w + j * g.pixels.stride_w;
        barrier_wait(ring.empty + ring.stage, ring.phase ^ 1);
        uint64* full = ring.full + ring.stage;
        unsigned char* stage = shared + ring.stage * Tile::STAGE_BYTES;
        barrier_arrive_expect(full, Tile::A_BYTES + units * Tile::CHUNK);
#pragma unroll
        for (int n = 0; n < blocks; ++n) {
            const int block = place.column * blocks + n, filter = item.row * Tile::M + block * 64;
            if constexpr (Tile::ACROSS > 1)
                multicast_tiled_2d(stage + block * Tile::CHUNK, grads, full, place.beside(), filter, pixel);
            else
                load_tiled_2d(stage + block * Tile::CHUNK, grads, full, filter, pixel);
        }
#pragma unroll
        for (int unit = 0; unit < most; ++unit) {
            unsigned char* to = stage + Tile::A_BYTES + unit * Tile::CHUNK;
            if (unit >= units) continue;
            const int channel = from[unit] >> 16 << 6, offset_w = from[unit] & 255, offset_h = from[unit] >> 8 & 255;
            if constexpr (Tile::DOWN > 1) {
                if (unit % Tile::DOWN == place.row)
                    multicast_im2col(to, images, full, place.below(), channel, w, h, image, offset_w, offset_h);
            } else {
                load_im2col(to, images, full, channel, w, h, image, offset_w, offset_h);
            }
        }
        ring.next<Tile::STAGES>();
        j += on_j;
        i += on_i;
        image += on_image;
        if (j >= g.pixels.width) {
            j -= g.pixels.width;
            ++i;
        }
        if (i >= g.pixels.height) {
            i -= g.pixels.height;
            ++image;
        }
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
    const Place<Tile> place;
    const int columns = g.taps * ((g.channels + 63) / 64) * 64, steps = ceil_div(g.pixels.rows, 64);
    auto each = [&](auto work) { for_items<Tile>(g.rows, columns, g.splits, steps, place, work); };
    if (threadIdx.x < GROUP) {
        registers_decrease<56>();
        if (threadIdx.x == 0) {
            prefetch_map(images);
            prefetch_map(grads);
            each([&](const Item& item) { load_weight<Tile>(shared, ring, images, grads, item, g, place); });
        }
    } else {
        registers_increase<224>();
        multiply<Tile, 1>(
            shared, ring, place, each, [&](const Item& item, const float(&sums)[Tile::BLOCKS][Tile::N / 2]) {
                store_weight<Tile>(sums, shared, threadIdx.x / GROUP - 1, out, item, g);
            });
    }
    close_ring<Tile>();
}

// `...` of the macros: stages, and of clusters: down, across, whether groups alternate, whether the copy engine stores.
#define FORWARD(name, bounds, in, out, blocks, n, ...)                                                         \
    extern "C" __global__ void bounds                                                                          \
        name(const __grid_constant__ TensorMap images, const __grid_constant__ TensorMap filters,              \
             const __grid_constant__ TensorMap outputs, const float* bias, out* y, Forward f) {                \
        forward<Tile<in, blocks, n, __VA_ARGS__>>(&images, &filters, &outputs, bias, y, f);                    \
    }
#define WEIGHT(name, bounds, blocks, n, ...)                                                                   \
    extern "C" __global__ void bounds                                                                          \
        name(const __grid_constant__ TensorMap images, const __grid_constant__ TensorMap grads, float* out,    \
             Weight g) {                                                                                       \
        weight<Tile<bf16, blocks, n, __VA_ARGS__>>(&images, &grads, out, g);                                   \
    }
#define BLOCK __launch_bounds__(THREADS, 1)
#define CLUSTER(size) __cluster_dims__(size, 1, 1) __launch_bounds__(THREADS, 1)
