// architectures: 90a
// Convolutions of stride 1 on Hopper, each pixel loaded once for all taps of a window.
//
// Images lie in shared memory as padded lines, one behind the other: line i of an image holds its row i - pad_top from
// column -pad_left on, and what is outside is zero. Lines of `pitch` pixels, of which each is a row of 128 bytes of
// channels, so form one sequence of positions, in which window tap (i, j) of the output at position m is position
// m + i * pitch + j: the left operand of every tap is the same memory from another row on. Positions that are no output
// (a line is longer than an output row) are computed and not stored. Zeros right of a row are the zeros left of the
// next, and likewise those between images. Wide images are cut into strips, each with lines of its own.
//
// Groups, barriers and stores are as in conv2d_wgmma.cuh, with two rings: filters of one tap, and patches of lines,
// both of one step of channels.
//
// After: NVIDIA, CUTLASS (warp-specialised kernels); Cho and Brand, arXiv:1706.06873 (one buffer that serves all taps).
#include "conv2d_wgmma.cuh"

constexpr int PATCHES = 2;
constexpr int CONSUMER_WARPS = 8;
constexpr int LEAD_BARRIER = 3;

// Numbers in the order in which a block needs them in dynamic shared memory; the last are Halo's. Products of 64
// positions with n filters each, or `turned` (n = 64): of 64 filters with all of a group's positions, for which the
// matrix units read less from shared memory.
template <typename T, int blocks, int n, bool turned> struct HaloTile {
    static_assert(!turned || n == 64, "rows of a turned product are 64 filters");
    typedef T type;
    static constexpr bool TURNED = turned;
    static constexpr bool ALTERNATE = false;
    static constexpr int BLOCKS = blocks;
    static constexpr int PRODUCTS = turned ? 1 : blocks;
    static constexpr int SUMS = turned ? 32 * blocks : n / 2;
    static constexpr int M = 2 * 64 * blocks;
    static constexpr int N = n;
    static constexpr int STEP = ROW / sizeof(T);
    static constexpr int B_BYTES = N * ROW;
    static constexpr int STAGING = 0;
    static constexpr int BARRIERS = 2 * 64 * SLAB_PITCH;
    static constexpr int PIXELS = BARRIERS + 256;  // where each row of the tile is stored
    static constexpr int FILTERS = 37 * 1024;
    static_assert(PIXELS + 4 * M <= FILTERS, "pixels are before filters");
};

// Lines of an image and its strips; outputs `height` x `width`; `chunks`: steps of channels; `stages` of filters.
// `based`: how the hardware counts rows of the swizzle's pattern (descriptor_base). `lead`: steps by which the first
// group that multiplies goes ahead of the second, so that one stores while the other multiplies.
struct Halo {
    int positions, pitch, image_lines, strips, strip_width, height, width, pad_top, pad_left;
    int taps_h, taps_w, chunks, columns, activation, patch_bytes, stages, based, lead;
};

__device__ const float NO_BIAS = 0.0f;

__device__ __forceinline__ void next(Ring& ring, int stages) {
    if (++ring.stage == stages) {
        ring.stage = 0;
        ring.phase ^= 1;
    }
}

struct Rings {
    Ring filters, patches;
};

template <typename Tile> __device__ __forceinline__ Rings open_rings(unsigned char* shared) {
    uint64* barriers = reinterpret_cast<uint64*>(shared + Tile::BARRIERS);
    Rings rings = {{barriers, barriers + MAX_STAGES, nullptr, 0, 0},
                   {barriers + 2 * MAX_STAGES, barriers + 2 * MAX_STAGES + PATCHES, nullptr, 0, 0}};
    if (threadIdx.x == 0) {
        for (int i = 0; i < MAX_STAGES; ++i) {
            barrier_init(rings.filters.full + i, 1);
            barrier_init(rings.filters.empty + i, CONSUMER_WARPS);
        }
        for (int i = 0; i < PATCHES; ++i) {
            barrier_init(rings.patches.full + i, 1);
            barrier_init(rings.patches.empty + i, CONSUMER_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    return rings;
}

template <typename Tile>
__device__ __forceinline__ void load_filters(unsigned char* shared, Ring& ring, const TensorMap* filters, int column,
                                             const Halo& h) {
    for (int chunk = 0; chunk < h.chunks; ++chunk)
        for (int tap = 0; tap < h.taps_h * h.taps_w; ++tap) {
            barrier_wait(ring.empty + ring.stage, ring.phase ^ 1);
            barrier_arrive_expect(ring.full + ring.stage, Tile::B_BYTES);
            load_tiled_3d(shared + Tile::FILTERS + ring.stage * Tile::B_BYTES, filters, ring.full + ring.stage,
                          chunk * Tile::STEP, tap, column);
            next(ring, h.stages);
        }
}

// Load the lines that positions from `first` on need.
template <typename Tile>
__device__ __forceinline__ void load_patches(unsigned char* patches, Ring& ring, const TensorMap* images, int first,
                                             const Halo& h) {
    int line = first / h.pitch;
    int lines = (first - line * h.pitch + Tile::M - 1 + h.taps_w - 1) / h.pitch + h.taps_h;
    int row = line % h.image_lines, strip = line / h.image_lines % h.strips, image = line / h.image_lines / h.strips;
    for (int chunk = 0; chunk < h.chunks; ++chunk) {
        barrier_wait(ring.empty + ring.stage, ring.phase ^ 1);
        uint64* full = ring.full + ring.stage;
        unsigned char* patch = patches + ring.stage * h.patch_bytes;
        barrier_arrive_expect(full, lines * h.pitch * ROW);
        int i = row, s = strip, n = image;
        for (int l = 0; l < lines; ++l) {
            load_tiled_4d(patch + l * h.pitch * ROW, images, full, chunk * Tile::STEP,
                          s * h.strip_width - h.pad_left, i - h.pad_top, n);
            if (++i == h.image_lines) {
                i = 0;
                if (++s == h.strips) {
                    s = 0;
                    ++n;
                }
            }
        }
        next(ring, PATCHES);
    }
}

// Sum over channels and taps for the group's positions, which begin `inside` positions into the patch. With `lead` > 0
// the other group is let go after that many steps.
template <typename Tile>
__device__ __forceinline__ void consume(float (&sums)[Tile::PRODUCTS][Tile::SUMS], Rings& rings, unsigned char* shared,
                                        int inside, int lead, const Halo& h) {
    unsigned char* patches = shared + Tile::FILTERS + h.stages * Tile::B_BYTES;
    Ring &filters = rings.filters, &ring = rings.patches;
    int taps = h.taps_h * h.taps_w, steps = h.chunks * taps, tap = 0, column = 0, previous = 0, previous_patch = 0;
    const unsigned char* rows = nullptr;
    for (int step = 0; step < steps; ++step) {
        if (step == lead && step > 0) named_barrier(LEAD_BARRIER, 2 * GROUP);
        if (tap == 0) {
            barrier_wait(ring.full + ring.stage, ring.phase);
            rows = patches + ring.stage * h.patch_bytes + inside * ROW;
        }
        barrier_wait(filters.full + filters.stage, filters.phase);
        uint64 a = matrix_descriptor(rows, 16, 8 * ROW) + (h.based ? descriptor_base(rows) : 0);
        uint64 b = matrix_descriptor(shared + Tile::FILTERS + filters.stage * Tile::B_BYTES, 16, 8 * ROW);
        product_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int i = 0; i < Tile::PRODUCTS; ++i) {
                uint64 positions = a + descriptor_offset(i * 64 * ROW + k * 32);
                uint64 columns = b + descriptor_offset(k * 32);
                product<0>(typename Tile::type(), sums[i], Tile::TURNED ? columns : positions,
                           Tile::TURNED ? positions : columns, step > 0 || k > 0);
            }
        product_commit();
        product_wait<1>();  // the products of the step before this are done
        if (step > 0 && threadIdx.x % 32 == 0) {
            barrier_arrive(filters.empty + previous);
            if (tap == 0) barrier_arrive(ring.empty + previous_patch);
        }
        previous = filters.stage;
        next(filters, h.stages);
        rows += ROW;
        if (++column == h.taps_w) {
            column = 0;
            rows += (h.pitch - h.taps_w) * ROW;
        }
        if (++tap == taps) {
            tap = 0;
            previous_patch = ring.stage;
            next(ring, PATCHES);
        }
    }
    product_wait<0>();
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(filters.empty + previous);
        barrier_arrive(ring.empty + previous_patch);
    }
}

// Write down at which pixel of the output each of the group's rows is stored, or -1.
template <typename Tile>
__device__ __forceinline__ void find_pixels(int* pixels, int group, int first, const Halo& h) {
    named_barrier(1 + group, GROUP);  // the tile before this is stored
    for (int r = threadIdx.x % GROUP; r < Tile::M / 2; r += GROUP) {
        int m = first + group * (Tile::M / 2) + r, line = m / h.pitch, j = m - line * h.pitch;
        int i = line % h.image_lines, strip = line / h.image_lines % h.strips, image = line / h.image_lines / h.strips;
        int column = strip * h.strip_width + j;
        bool stored = m < h.positions && i < h.height && j < h.strip_width && column < h.width;
        pixels[group * (Tile::M / 2) + r] = stored ? (image * h.height + i) * h.width + column : -1;
    }
}

// `store` of conv2d_wgmma.cuh for turned products: 64 positions at a time, whose sums lie along registers.
template <typename Tile, typename Out, typename Finish, typename Row>
__device__ __forceinline__ void store_turned(const float (&sums)[Tile::SUMS], unsigned char* shared, int group,
                                             bool aligned, Finish finish, Row row, int columns) {
    unsigned char* slab = shared + Tile::STAGING + group * 64 * SLAB_PITCH;
    int thread = threadIdx.x % GROUP, filter = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int block = 0; block < Tile::BLOCKS; ++block) {
        named_barrier(1 + group, GROUP);  // the slab before this has been read
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            int position = i / 4 * 8 + thread % 4 * 2 + i % 2, column = filter + i / 2 % 2 * 8;
            reinterpret_cast<Out*>(slab + position * SLAB_PITCH)[column] =
                from_float<Out>(finish(sums[block * 32 + i], column));
        }
        named_barrier(1 + group, GROUP);
        int first = (group * Tile::BLOCKS + block) * 64;
        store_slab<Out, 64>(slab, columns, aligned, [&](int r) { return row(first + r, 0); });
    }
}

template <typename Tile, typename Out>
__device__ __forceinline__ void store_pixels(const float (&sums)[Tile::PRODUCTS][Tile::SUMS], unsigned char* shared,
                                             int group, const float* bias, Out* y, int first, const Halo& h) {
    constexpr int width = SLAB / sizeof(Out) < Tile::N ? SLAB / sizeof(Out) : Tile::N;
    const int* pixels = reinterpret_cast<const int*>(shared + Tile::PIXELS);
    y += first;
    auto row = [&](int r, int slab) -> Out* {
        int pixel = pixels[r];
        return pixel < 0 ? nullptr : y + static_cast<int64>(pixel) * h.columns + slab * width;
    };
    auto columns = [&](int slab) { return h.columns - first - slab * width; };
    bool aligned = h.columns % (16 / sizeof(Out)) == 0 && reinterpret_cast<uint64>(y) % 16 == 0;
    auto put = [&](auto finish) {
        if constexpr (Tile::TURNED)
            store_turned<Tile, Out>(sums[0], shared, group, aligned, finish, row, columns(0));
        else
            store<Tile, Out>(sums, shared, group, aligned, finish, row, columns);
    };
    if (bias == nullptr && h.activation == IDENTITY) {
        put([](float sum, int) { return sum; });
        return;
    }
    float low = h.activation == IDENTITY ? 1.0f : 0.1f;
    bool relu = h.activation == RELU;
    const float* shifts = bias == nullptr ? &NO_BIAS : bias;
    int last = bias == nullptr ? 0 : h.columns - 1;
    put([&](float sum, int column) {  // as `activate`, in selections instead of branches
        float x = sum + shifts[min(first + column, last)];
        float below = relu ? (x == x ? 0.0f : x) : low * x;
        return x > 0.0f ? x : below;
    });
}

template <typename Tile, typename Out>
__device__ __forceinline__ void halo(const TensorMap* images, const TensorMap* filters, const float* bias, Out* y,
                                     const Halo& h) {
    DYNAMIC_SHARED(shared);
    Rings rings = open_rings<Tile>(shared);
    int tile_columns = ceil_div(h.columns, Tile::N);
    int64 items = static_cast<int64>(ceil_div(h.positions, Tile::M)) * tile_columns;
    if (threadIdx.x < GROUP) {
        registers_decrease<40>();
        if (threadIdx.x == 0) {
            prefetch_map(filters);
            for (int64 item = blockIdx.x; item < items; item += gridDim.x)
                load_filters<Tile>(shared, rings.filters, filters, item % tile_columns * Tile::N, h);
        } else if (threadIdx.x == 32) {
            prefetch_map(images);
            unsigned char* patches = shared + Tile::FILTERS + h.stages * Tile::B_BYTES;
            for (int64 item = blockIdx.x; item < items; item += gridDim.x)
                load_patches<Tile>(patches, rings.patches, images, item / tile_columns * Tile::M, h);
        }
    } else {
        registers_increase<232>();
        int group = __shfl_sync(0xffffffff, threadIdx.x / GROUP, 0) - 1;  // known to be the same in all lanes
        int lead = group == 0 ? h.lead : 0;
        if (group == 1 && h.lead > 0) named_barrier(LEAD_BARRIER, 2 * GROUP);
        for (int64 item = blockIdx.x; item < items; item += gridDim.x) {
            int first = item / tile_columns * Tile::M;
            float sums[Tile::PRODUCTS][Tile::SUMS];
            consume<Tile>(sums, rings, shared, first % h.pitch + group * (Tile::M / 2), lead, h);
            lead = 0;
            find_pixels<Tile>(reinterpret_cast<int*>(shared + Tile::PIXELS), group, first, h);
            store_pixels<Tile>(sums, shared, group, bias, y, item % tile_columns * Tile::N, h);
        }
    }
}

#define HALO(name, type, blocks, n, turned)                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
        name(const __grid_constant__ TensorMap images, const __grid_constant__ TensorMap filters, \
             const float* bias, type* y, Halo h) {                                                \
        halo<HaloTile<type, blocks, n, turned>>(&images, &filters, bias, y, h);                   \
    }
#define HALO_TYPES(tile, blocks, n, turned)                          \
    HALO(conv2d_forward_halo_##tile##_bf16, bf16, blocks, n, turned) \
    HALO(conv2d_forward_halo_##tile##_tf32, float, blocks, n, turned)
HALO_TYPES(256x128, 2, 128, false)
HALO_TYPES(128x128, 1, 128, false)
HALO_TYPES(384x64, 3, 64, false)
HALO_TYPES(256x64, 2, 64, false)
HALO_TYPES(512x64_turned, 4, 64, true)
HALO_TYPES(384x64_turned, 3, 64, true)
