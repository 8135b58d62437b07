// architectures: 90a
// Weight gradients of which every cluster of blocks gets equally many steps, whatever the number of tiles ("stream-K":
// Osama et al., arXiv:2301.03598). All steps of all tiles are one row, cut at as many places as there are clusters. A
// cluster stores tiles that it has for itself; of a tile that is cut it leaves a partial sum, and a second kernel adds
// those up in the order of steps.
#include "conv2d_wgmma_passes.cuh"

// The row of steps: `tile_rows` by `tile_columns` tiles of clusters, columns fastest, with `steps` each. Steps times
// clusters are less than 2^31: divisions of 32 bits are several times as fast as those of 64.
struct Cut {
    int tile_rows, tile_columns, steps, clusters;

    __device__ __forceinline__ int all() const { return tile_rows * tile_columns * steps; }
    __device__ __forceinline__ int begin(int cluster) const { return all() * cluster / clusters; }
    // The last cluster that does not begin behind a step. Every cluster has at least one.
    __device__ __forceinline__ int owner(int step) const { return ((step + 1) * clusters - 1) / all(); }
};

// What a block does of one tile. `slot`: where its partial sum goes, or -1 where it has the whole tile. A cluster has
// two slots: one for the tile it begins with, one for the tile it ends with.
struct Part {
    int row, column, first, steps, slot;
};

template <typename Tile, typename Work>
__device__ __forceinline__ void for_parts(const Cut& cut, const Place<Tile>& place, Work work) {
    const int cluster = blockIdx.x / Tile::CLUSTER;
    const int at = cut.begin(cluster);
    int rest = cut.begin(cluster + 1) - at;
    int tile = at / cut.steps, first = at % cut.steps, slot = 2 * cluster;
    while (rest > 0) {
        Part part;
        part.row = tile / cut.tile_columns * Tile::DOWN + place.row;
        part.column = tile % cut.tile_columns * Tile::ACROSS + place.column;
        part.first = first;
        part.steps = min(rest, cut.steps - first);
        part.slot = part.steps == cut.steps ? -1 : slot;
        work(part);
        rest -= part.steps;
        first = 0;
        ++tile;
        slot = 2 * cluster + 1;
    }
}

// Rows and columns of a 64-row block as a thread holds them; see `product_bf16`.
__device__ __forceinline__ int line_of(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
__device__ __forceinline__ int pair_of(int thread) { return thread % 4 * 2; }

// Two neighbours of a row; gradients of weights need not be aligned to pairs.
__device__ __forceinline__ void put(float* to, bool aligned, float x, float y) {
    if (aligned) {
        put_pair(to, x, y);
    } else {
        to[0] = x;
        to[1] = y;
    }
}

__device__ __forceinline__ bool pairs_aligned(const float* out) { return reinterpret_cast<uint64>(out) % 8 == 0; }

// Where 64 columns begin within a row of the gradient, and how many of them there are.
struct Unit {
    int64 at;
    int width;

    __device__ __forceinline__ Unit(int unit, const Weight& g) {
        const int chunks = (g.channels + 63) / 64, tap = unit / chunks, channel = (unit - tap * chunks) * 64;
        at = static_cast<int64>(tap) * g.channels + channel;
        width = tap < g.taps ? g.channels - channel : 0;
    }
};

// Straight from registers: four threads fill a sector of 32 bytes.
template <typename Tile>
__device__ __forceinline__ void store_whole(const float (&sums)[Tile::BLOCKS][Tile::N / 2], int group, float* out,
                                            const Part& part, const Weight& g) {
    const int thread = threadIdx.x % GROUP, line = part.row * Tile::M + group * Tile::BLOCKS * 64 + line_of(thread);
    const int64 pitch = static_cast<int64>(g.taps) * g.channels;
    const bool aligned = pairs_aligned(out);
#pragma unroll
    for (int n = 0; n < Tile::N / 64; ++n) {
        const Unit unit(part.column * (Tile::N / 64) + n, g);
#pragma unroll
        for (int block = 0; block < Tile::BLOCKS; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int m = line + block * 64 + half * 8;
                if (m >= g.rows) continue;
                float* to = out + m * pitch + unit.at + pair_of(thread);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float* pair = &sums[block][(n * 8 + j) * 4 + 2 * half];
                    if (8 * j < unit.width) put(to + 8 * j, aligned, pair[0], pair[1]);
                }
            }
    }
}

// A partial sum lies in memory as it lies in registers: 16 bytes a thread, one after the other.
template <typename Tile>
__device__ __forceinline__ void store_partial(const float (&sums)[Tile::BLOCKS][Tile::N / 2], int group,
                                              float* partial, const Part& part, const Place<Tile>& place) {
    const int rank = place.row * Tile::ACROSS + place.column;
    float4* to = reinterpret_cast<float4*>(partial) +
                 (static_cast<int64>(part.slot) * Tile::CLUSTER + rank) * (Tile::M * Tile::N / 4) +
                 group * (Tile::BLOCKS * Tile::N / 8 * GROUP) + threadIdx.x % GROUP;
#pragma unroll
    for (int block = 0; block < Tile::BLOCKS; ++block)
#pragma unroll
        for (int j = 0; j < Tile::N / 8; ++j) {
            const float* four = &sums[block][4 * j];
            to[(block * (Tile::N / 8) + j) * GROUP] = make_float4(four[0], four[1], four[2], four[3]);
        }
}

template <typename Tile>
__device__ __forceinline__ void even(const TensorMap* images, const TensorMap* grads, float* partial, float* out,
                                     const Weight& g, const Cut& cut) {
    static_assert(!Tile::ALTERNATE, "both groups multiply all parts");
    DYNAMIC_SHARED(shared);
    Ring ring = open_ring<Tile>(shared);
    const Place<Tile> place;
    constexpr bool large = Tile::BLOCKS * Tile::N > 256;  // sums take 192 registers
    if (threadIdx.x < GROUP) {
        registers_decrease<large ? 40 : 56>();
        if (threadIdx.x == 0) {
            prefetch_map(images);
            prefetch_map(grads);
            for_parts<Tile>(cut, place, [&](const Part& part) {
                load_weight<Tile>(shared, ring, images, grads, part, g, place);
            });
        }
    } else {
        registers_increase<large ? 232 : 224>();
        const int group = threadIdx.x / GROUP - 1;
        for_parts<Tile>(cut, place, [&](const Part& part) {
            float sums[Tile::BLOCKS][Tile::N / 2];
            consume<Tile, 1>(sums, ring, shared, group, part.steps, place, [] {});
            if (part.slot < 0) store_whole<Tile>(sums, group, out, part, g);
            else store_partial<Tile>(sums, group, partial, part, place);
        });
    }
    close_ring<Tile>();
}

constexpr int SUM_THREADS = 256;

__device__ __forceinline__ void add(float4& sum, const float4& x) {
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
}

// Add up the partial sums of tiles of m x n in clusters of down x across. Of a tile's partial sums, `lanes` (a power of
// two) threads each take every so many; each has the same four elements.
__device__ __forceinline__ void add_parts(const float4* partial, float* out, const Weight& g, const Cut& cut, int lanes,
                                          int m, int n, int down, int across) {
    __shared__ float4 sums[SUM_THREADS];
    const int each = SUM_THREADS / lanes, lane = threadIdx.x / each, pieces = m * n / 4 / each;
    const int members = down * across;
    const uint32 tasks = cut.tile_rows * cut.tile_columns * members * pieces;  // more would fill any memory
    const int64 pitch = static_cast<int64>(g.taps) * g.channels;
    const int64 slot = static_cast<int64>(members) * (m * n / 4);
    const bool aligned = pairs_aligned(out);
    for (uint32 task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int piece = task % pieces, rank = task / pieces % members, tile = task / pieces / members;
        const int begin = tile * cut.steps;
        const int first = cut.owner(begin), last = cut.owner(begin + cut.steps - 1);
        if (first == last) continue;  // stored by its only cluster
        const int at = piece * each + threadIdx.x % each, thread = at % GROUP, j = at / GROUP % (n / 8);
        const int block = at / GROUP / (n / 8);
        const int row = (tile / cut.tile_columns * down + rank / across) * m + block * 64 + line_of(thread);
        const int column = (tile % cut.tile_columns * across + rank % across) * n + 8 * j;
        const Unit unit(column / 64, g);
        const bool inside = row < g.rows && column % 64 < unit.width;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (inside) {
            const float4* from = partial + rank * (m * n / 4) + at;
            if (lane == 0) sum = from[(2 * first + (cut.begin(first) < begin)) * slot];
#pragma unroll 8
            for (int cluster = first + (lane == 0 ? lanes : lane); cluster <= last; cluster += lanes)
                add(sum, from[2 * cluster * slot]);
        }
        if (lanes > 1) {
            __syncthreads();  // the sums of the task before this have been read
            sums[threadIdx.x] = sum;
            __syncthreads();
            if (lane == 0)
                for (int other = 1; other < lanes; ++other) add(sum, sums[other * each + threadIdx.x]);
        }
        if (lane > 0 || !inside) continue;
        float* to = out + row * pitch + unit.at + column % 64 + pair_of(thread);
        put(to, aligned, sum.x, sum.y);
        if (row + 8 < g.rows) put(to + 8 * pitch, aligned, sum.z, sum.w);
    }
}

#define EVEN(tile, bounds, blocks, n, ...)                                                                           \
    extern "C" __global__ void bounds conv2d_even_wgmma_##tile##_bf16(                                               \
        const __grid_constant__ TensorMap images, const __grid_constant__ TensorMap grads, float* partial,           \
        float* out, Weight g, Cut cut) {                                                                             \
        even<Tile<bf16, blocks, n, __VA_ARGS__>>(&images, &grads, partial, out, g, cut);                             \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS)                                                        \
        conv2d_even_sum_wgmma_##tile##_bf16(const float* partial, float* out, Weight g, Cut cut, int lanes) {        \
        typedef Tile<bf16, blocks, n, __VA_ARGS__> T;                                                                \
        add_parts(reinterpret_cast<const float4*>(partial), out, g, cut, lanes, T::M, T::N, T::DOWN, T::ACROSS);     \
    }
EVEN(128x256, BLOCK, 1, 256, 4)
EVEN(128x192, BLOCK, 1, 192, 4)
EVEN(128x128, BLOCK, 1, 128, 6)
EVEN(256x128, BLOCK, 2, 128, 4)
EVEN(256x192, BLOCK, 2, 192, 3)
EVEN(128x256_2x1, CLUSTER(2), 1, 256, 4, 2, 1)
EVEN(256x128_1x2, CLUSTER(2), 2, 128, 4, 1, 2)
EVEN(256x128_2x1, CLUSTER(2), 2, 128, 4, 2, 1)
EVEN(256x192_2x1, CLUSTER(2), 2, 192, 3, 2, 1)
