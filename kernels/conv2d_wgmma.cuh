// The pipeline of conv2d_wgmma.cu: one warp group loads, two multiply.
//
// A block has three groups of four warps. A thread of the first has the copy engine fill a ring of stages, each one
// step of 128 bytes (64 bf16 or 32 tf32) along the dimension that is summed; the others multiply them, each its own
// rows of the block's tile, and store it. A stage passes between them by two barriers, "full" and "empty". Blocks stay
// and take tile after tile, so that the next tile's stages are loaded while one is stored.
//
// Groups that alternate have whole tiles, the first every other one and the second those between: one multiplies while
// the other stores. Blocks of a cluster go through their tiles in step; those with the same rows share A, those with
// the same columns share B: each loads its part of it for all of them.
//
// After: NVIDIA, CUTLASS, "Efficient GEMM in CUDA" (warp-specialised kernels); Chetlur et al., arXiv:1410.0759
// (implicit products).
#pragma once
#include "hopper.cuh"

constexpr int GROUP = 128;              // threads of a warp group
constexpr int THREADS = 3 * GROUP;      // one group loads, two multiply
constexpr int ROW = 128;                // bytes of a step in each row of a stage
constexpr int SLAB = 256;               // bytes of a row that are stored at a time
constexpr int SLAB_PITCH = SLAB + 16;   // rows begin 4 banks further on
constexpr int MAX_STAGES = 8;

// Numbers in the order in which a block needs them in dynamic shared memory.
// T: type of the products (float stands for tf32); blocks: 64-row blocks of a group; n: columns of the tile; down,
// across: blocks of a cluster that differ in rows and in columns.
template <typename T, int blocks, int n, int count, int down = 1, int across = 1, bool alternate = false> struct Tile {
    typedef T type;
    static constexpr int BLOCKS = blocks;
    static constexpr bool ALTERNATE = alternate;
    static constexpr int M = (alternate ? 1 : 2) * 64 * blocks;
    static constexpr int N = n;
    static constexpr int STAGES = count;
    static constexpr int DOWN = down, ACROSS = across, CLUSTER = down * across;
    static constexpr int A_PART = M / across, B_PART = n / down;       // rows that one block loads
    static constexpr int READERS = down + across - 1;                  // blocks that read what one block loads
    static constexpr int CONSUMER_WARPS = alternate ? 4 : 8;
    static constexpr int STEP = ROW / sizeof(T);       // elements
    static constexpr int CHUNK = 64 * ROW;             // bytes of 64 rows
    static constexpr int A_BYTES = M * ROW;
    static constexpr int B_BYTES = N * ROW;
    static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int STAGING = STAGES * STAGE_BYTES;
    static constexpr int BARRIERS = STAGING + 2 * 64 * SLAB_PITCH;
    static constexpr int SHARED = BARRIERS + (2 * MAX_STAGES + 2) * 8;
    static_assert(count <= MAX_STAGES && SHARED <= 232448, "more than a block may have");
};

// A block's place in its cluster. Ranks go along columns first.
template <typename Tile> struct Place {
    int row, column;

    __device__ __forceinline__ Place() : row(0), column(0) {
        if constexpr (Tile::CLUSTER > 1) {
            row = cluster_rank() / Tile::ACROSS;
            column = cluster_rank() % Tile::ACROSS;
        }
    }
    // Bits of the blocks with the same rows, which read the same A; and of those with the same columns.
    __device__ __forceinline__ int beside() const { return ((1 << Tile::ACROSS) - 1) << row * Tile::ACROSS; }
    __device__ __forceinline__ int below() const {
        int bits = 0;
#pragma unroll
        for (int i = 0; i < Tile::DOWN; ++i) bits |= 1 << (i * Tile::ACROSS + column);
        return bits;
    }
    // The i-th of the blocks that load for this one, and that this one loads for.
    __device__ __forceinline__ int neighbour(int i) const {
        if (i < Tile::ACROSS) return row * Tile::ACROSS + i;
        int other = i - Tile::ACROSS;
        return (other + (other >= row)) * Tile::ACROSS + column;
    }
};

// The ring of stages as one thread goes round it.
struct Ring {
    uint64* full;
    uint64* empty;
    uint64* turns;  // of groups that alternate
    int stage;
    uint32 phase;

    template <int stages> __device__ __forceinline__ void next() {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1;
        }
    }
    // Pass over the stages of the other group's tile.
    template <int stages> __device__ __forceinline__ void skip(int steps) {
        stage += steps;
        phase ^= stage / stages & 1;
        stage %= stages;
    }
};

template <typename Tile> __device__ __forceinline__ Ring open_ring(unsigned char* shared) {
    Ring ring;
    ring.full = reinterpret_cast<uint64*>(shared + Tile::BARRIERS);
    ring.empty = ring.full + MAX_STAGES;
    ring.turns = ring.empty + MAX_STAGES;
    ring.stage = 0;
    ring.phase = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::STAGES; ++i) {
            barrier_init(ring.full + i, 1);
            barrier_init(ring.empty + i, Tile::CONSUMER_WARPS * Tile::READERS);
        }
        for (int i = 0; i < 2; ++i) barrier_init(ring.turns + i, Tile::CONSUMER_WARPS);
        barrier_init_fence();
    }
    if constexpr (Tile::CLUSTER > 1) cluster_sync();
    else __syncthreads();
    return ring;
}

// Before a block ends: the others of its cluster may still load for it and arrive at its barriers.
template <typename Tile> __device__ __forceinline__ void close_ring() {
    if constexpr (Tile::CLUSTER > 1) cluster_sync();
}

// A warp has read a stage; tell all blocks that load for it.
template <typename Tile> __device__ __forceinline__ void release(uint64* empty, const Place<Tile>& place) {
    int lane = threadIdx.x % 32;
    if constexpr (Tile::CLUSTER > 1) {
        if (lane < Tile::READERS) barrier_arrive_at(empty, place.neighbour(lane));
    } else {
        if (lane == 0) barrier_arrive(empty);
    }
}

template <int transposed, int registers>
__device__ __forceinline__ void product(bf16, float (&d)[registers], uint64 a, uint64 b, int accumulate) {
    product_bf16<transposed>(d, a, b, accumulate);
}
template <int transposed, int registers>
__device__ __forceinline__ void product(float, float (&d)[registers], uint64 a, uint64 b, int accumulate) {
    product_tf32(d, a, b, accumulate);
}

// Sum the products of `steps` stages. Not transposed: a stage holds rows of 128 bytes along the summed dimension, of A
// and then of B. Transposed: it holds 64 rows, one an element of that dimension, for each 64 rows of A, columns of B.
// `part`: of the tile's rows, in units of BLOCKS blocks. `done`: called when the last products have begun.
template <typename Tile, int transposed, typename Done>
__device__ __forceinline__ void consume(float (&sums)[Tile::BLOCKS][Tile::N / 2], Ring& ring, unsigned char* shared,
                                        int part, int steps, const Place<Tile>& place, Done done) {
    constexpr int leading = transposed ? Tile::CHUNK : 16;
    constexpr int advance = transposed ? 16 * ROW : 32;
    int previous = 0;
    for (int step = 0; step < steps; ++step) {
        barrier_wait(ring.full + ring.stage, ring.phase);
        unsigned char* stage = shared + ring.stage * Tile::STAGE_BYTES;
        uint64 a = matrix_descriptor(stage + part * Tile::BLOCKS * Tile::CHUNK, leading, 8 * ROW);
        uint64 b = matrix_descriptor(stage + Tile::A_BYTES, leading, 8 * ROW);
        product_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int block = 0; block < Tile::BLOCKS; ++block)
                product<transposed>(typename Tile::type(), sums[block],
                                    a + descriptor_offset(block * Tile::CHUNK + k * advance),
                                    b + descriptor_offset(k * advance), step > 0 || k > 0);
        product_commit();
        product_wait<1>();  // the products of the step before this are done: its stage may be filled again
        if (step > 0) release<Tile>(ring.empty + previous, place);
        previous = ring.stage;
        ring.next<Tile::STAGES>();
    }
    done();
    product_wait<0>();
    if (steps > 0) release<Tile>(ring.empty + previous, place);
    if (steps == 0) {
#pragma unroll
        for (int block = 0; block < Tile::BLOCKS; ++block) clear(sums[block]);
    }
}

// Two neighbours in one store.
__device__ __forceinline__ void put_pair(float* to, float x, float y) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
__device__ __forceinline__ void put_pair(bf16* to, float x, float y) {
    *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
}

struct alignas(16) Vector { uint32 words[4]; };

// Put columns `first` to `first + width` of a 64-row block into this group's slab, as `finish(sum, column)` has them.
template <typename Out, int width, int registers, typename Finish>
__device__ __forceinline__ void fill_slab(unsigned char* slab, const float (&sums)[registers], int first,
                                          Finish finish) {
    int thread = threadIdx.x % GROUP;
    int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int j = 0; j < width / 8; ++j) {
        int column = 8 * j + thread % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* pair = &sums[(first / 8 + j) * 4 + 2 * half];
            put_pair(reinterpret_cast<Out*>(slab + (row + 8 * half) * SLAB_PITCH) + column,
                     finish(pair[0], first + column), finish(pair[1], first + column + 1));
        }
    }
}

// Write the slab's 64 rows, of which `columns` columns count, to `row(i)`: a pointer to row i, null if there is none.
// `aligned`: rows begin at multiples of 16 bytes.
template <typename Out, int width, typename Row>
__device__ __forceinline__ void store_slab(const unsigned char* slab, int columns, bool aligned, Row row) {
    constexpr int each = 16 / sizeof(Out);
    constexpr int vectors = width / each;
    static_assert(64 * vectors % GROUP == 0, "every thread stores as many vectors");
#pragma unroll 1  // short code matters more than latency: there are many slabs
    for (int turn = 0; turn < 64 * vectors / GROUP; ++turn) {
        int i = turn * GROUP + threadIdx.x % GROUP, column = i % vectors * each;
        Out* to = row(i / vectors);
        if (to == nullptr || column >= columns) continue;
        const unsigned char* from = slab + i / vectors * SLAB_PITCH + i % vectors * 16;
        if (aligned && column + each <= columns) {
            *reinterpret_cast<Vector*>(to + column) = *reinterpret_cast<const Vector*>(from);
        } else {
            for (int e = 0; e < each && column + e < columns; ++e)
                to[column + e] = reinterpret_cast<const Out*>(from)[e];
        }
    }
}

// Store a group's part of the tile, slab after slab. `finish(sum, column)`, `row(row, slab)` and `columns(slab)` are of
// the tile: rows from its first, columns from its first, slabs of `width` columns.
template <typename Tile, typename Out, typename Finish, typename Row, typename Columns>
__device__ __forceinline__ void store(const float (&sums)[Tile::BLOCKS][Tile::N / 2], unsigned char* shared, int group,
                                      bool aligned, Finish finish, Row row, Columns columns) {
    constexpr int width = SLAB / sizeof(Out) < Tile::N ? SLAB / sizeof(Out) : Tile::N;
    static_assert(Tile::N % width == 0, "slabs must tile the columns");
    unsigned char* slab = shared + Tile::STAGING + group * 64 * SLAB_PITCH;
#pragma unroll
    for (int block = 0; block < Tile::BLOCKS; ++block) {
        int first = ((Tile::ALTERNATE ? 0 : group * Tile::BLOCKS) + block) * 64;
#pragma unroll
        for (int i = 0; i < Tile::N / width; ++i) {
            named_barrier(1 + group, GROUP);  // the slab before this has been read
            fill_slab<Out, width>(slab, sums[block], i * width, finish);
            named_barrier(1 + group, GROUP);
            store_slab<Out, width>(slab, columns(i), aligned, [&](int r) { return row(first + r, i); });
        }
    }
}
