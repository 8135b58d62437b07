// The functions of kernels/hopper.cuh for the CPU, written from the PTX ISA: what is asynchronous happens as late as it
// may. Copies arrive when somebody waits for them, NaNs being in their place until then; products read their operands at
// the wait for their group. A kernel that waits too little, or gives away a stage too early, computes nonsense.
#pragma once
#include "fibers.h"
#include "warp.h"

namespace emulation {

// What tensor_map.py writes for the emulation in place of a CUtensorMap.
struct Map {
    unsigned long long address, strides[3];  // bytes from one index of dimensions 1, 2, 3 to the next
    unsigned int extents[4], box[4];         // im2col: box[0] channels, box[1] pixels
    int lower[2], upper[2];                  // corners (w, h) of the box of base pixels
    unsigned int steps[4];
    unsigned short im2col, rank, element_bytes, unused;
};

inline const Map& open_map(const TensorMap* map, bool im2col, int rank) {
    static_assert(sizeof(Map) <= sizeof(TensorMap), "a map has 128 bytes");
    const Map& m = *reinterpret_cast<const Map*>(map);
    if (m.im2col != im2col || m.rank != rank) fail("the tensor map is of another mode or rank than the copy");
    if (m.box[0] * m.element_bytes != 128) fail("boxes must be 128 bytes wide for the 128-byte swizzle");
    return m;
}

// Addresses as instructions have them: dynamic shared memory begins after the first KiB of the window.
inline unsigned int window(const void* p) {
    return static_cast<const unsigned char*>(p) - state.dynamic_shared + 1024;
}
// 128-byte swizzle: bits 4 to 6 of an address are xor-ed with bits 7 to 9, counted from row `base` of the pattern.
inline unsigned char* swizzled(unsigned int address, unsigned int base = 0) {
    address ^= ((address >> 7) - base & 7) << 4;
    unsigned char* p = state.dynamic_shared + address - 1024;
    if (!is_shared(p, 16 - address % 16)) fail("shared address %u is outside dynamic shared memory", address);
    return p;
}

// An mbarrier; a phase ends when nobody is pending and no bytes are.
struct Barrier {
    int bytes;
    unsigned short pending;
    unsigned short count : 15, phase : 1;

    void settle() {
        if (pending || bytes) return;
        phase ^= 1;
        pending = count;
    }
};
static_assert(sizeof(Barrier) == 8, "a barrier is a 64-bit word");

struct TensorCopy {
    Barrier* barrier;
    unsigned int shared;
    Map map;
    int coordinates[4], offsets[2];
};
constexpr int MAX_TENSOR_COPIES = 256;
static TensorCopy tensor_copies[MAX_TENSOR_COPIES];
static int num_tensor_copies = 0;

inline bool inside(const Map& map, const long long (&at)[4]) {
    for (int i = 0; i < map.rank; i++)
        if (at[i] < 0 || at[i] >= map.extents[i]) return false;
    return true;
}

// Put one row of 128 bytes, of elements from `at` on along dimension 0.
inline void put_row(const TensorCopy& copy, unsigned int row, long long (&at)[4]) {
    const Map& map = copy.map;
    long long first = at[0];
    for (unsigned int i = 0; i < map.box[0]; i++) {
        at[0] = first + i;
        unsigned char* to = swizzled(copy.shared + row * 128 + i * map.element_bytes);
        if (!inside(map, at)) {
            std::memset(to, 0, map.element_bytes);
            continue;
        }
        const unsigned char* from = reinterpret_cast<const unsigned char*>(map.address) + at[0] * map.element_bytes;
        for (int d = 1; d < map.rank; d++) from += at[d] * static_cast<long long>(map.strides[d - 1]);
        std::memcpy(to, from, map.element_bytes);
    }
    at[0] = first;
}

inline unsigned int num_rows(const Map& map) {
    unsigned int rows = 1;
    for (int i = 1; i < (map.im2col ? 2 : map.rank); i++) rows *= map.box[i];
    return rows;
}

inline void arrive_tiled(const TensorCopy& copy) {
    for (unsigned int row = 0; row < num_rows(copy.map); row++) {
        long long at[4] = {copy.coordinates[0], 0, 0, 0};
        unsigned int rest = row;
        for (int d = 1; d < copy.map.rank; d++) {
            at[d] = copy.coordinates[d] + rest % copy.map.box[d];
            rest /= copy.map.box[d];
        }
        put_row(copy, row, at);
    }
}

// Base pixels go along w, then h, then n, in steps, from the given one on; past the upper corner they go on at the lower
// one of the next line. What is read is the base pixel plus the offsets.
inline void arrive_im2col(const TensorCopy& copy) {
    const Map& map = copy.map;
    long long base[3] = {copy.coordinates[1], copy.coordinates[2], copy.coordinates[3]};
    for (unsigned int row = 0; row < num_rows(map); row++) {
        long long at[4] = {copy.coordinates[0], base[0] + copy.offsets[0], base[1] + copy.offsets[1], base[2]};
        put_row(copy, row, at);
        base[0] += map.steps[1];
        if (base[0] <= static_cast<long long>(map.extents[1]) - 1 + map.upper[0]) continue;
        base[0] = map.lower[0];
        base[1] += map.steps[2];
        if (base[1] <= static_cast<long long>(map.extents[2]) - 1 + map.upper[1]) continue;
        base[1] = map.lower[1];
        base[2]++;
    }
}

inline void copies_arrive(Barrier* barrier) {
    int kept = 0;
    for (int i = 0; i < num_tensor_copies; i++) {
        const TensorCopy& copy = tensor_copies[i];
        if (copy.barrier != barrier) {
            if (kept != i) tensor_copies[kept] = copy;
            kept++;
            continue;
        }
        copy.map.im2col ? arrive_im2col(copy) : arrive_tiled(copy);
        barrier->bytes -= num_rows(copy.map) * 128;
    }
    num_tensor_copies = kept;
    barrier->settle();
}

// `to` and `counter`: where it goes, if that is in another block than `shared` and `barrier`.
inline void start_copy(void* shared, const Map& map, uint64* barrier, const int (&coordinates)[4],
                       const int (&offsets)[2], void* to = nullptr, uint64* counter = nullptr) {
    if (num_tensor_copies == MAX_TENSOR_COPIES) fail("more than %d tensor copies at once", MAX_TENSOR_COPIES);
    if (window(shared) % 128) fail("a swizzled copy to address %u, not a multiple of 128", window(shared));
    if (!is_shared(shared, num_rows(map) * 128)) fail("a copy reaches out of shared memory");
    TensorCopy copy = {reinterpret_cast<Barrier*>(counter ? counter : barrier), window(shared), map, {}, {offsets[0], offsets[1]}};
    for (int i = 0; i < 4; i++) copy.coordinates[i] = coordinates[i];
    for (int i = 0; i < 2; i++)
        if (offsets[i] < 0 || offsets[i] > 255) fail("im2col offset %d is not in 0 to 255", offsets[i]);
    std::memset(to ? to : shared, 0xff, num_rows(map) * 128);
    tensor_copies[num_tensor_copies++] = copy;
}

// ---- products ----

struct Product {
    float* sums;
    uint64 a, b;
    int n, element_bytes, transposed, accumulate;
    unsigned int group;
};
constexpr int MAX_PRODUCTS = 32;
struct Products {
    Product pending[MAX_PRODUCTS];
    int count;
    unsigned int group;
    bool fenced;
};
static Products products[MAX_THREADS];
inline Products& my_products() { return products[state.current->rank * state.block_threads + threadIdx.x]; }

// Element (i, k) of a matrix: i counts rows of A or columns of B.
inline float element(uint64 descriptor, bool transposed, int element_bytes, int i, int k) {
    unsigned int start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    unsigned int stride = (descriptor >> 32 & 0x3fff) << 4, address;
    if (descriptor >> 62 != 1) fail("only the 128-byte swizzle is known");
    if (transposed)  // atoms of 64 i x 8 k; the leading offset goes along i, the stride offset along k
        address = start + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2;
    else  // atoms of 8 i x 128 bytes of k; the stride offset goes along i
        address = start + i / 8 * stride + i % 8 * 128 + k * element_bytes;
    const unsigned char* p = swizzled(address, descriptor >> 49 & 7);
    if (element_bytes == 2) {
        bf16 x;
        std::memcpy(&x, p, 2);
        return to_float(x);
    }
    unsigned int bits;
    std::memcpy(&bits, p, 4);
    return __uint_as_float(bits & 0xffffe000);  // a tf32 is the upper 19 bits of a float
}

inline void multiply(const Product& product) {
    int thread = threadIdx.x % 128, depth = 32 / product.element_bytes;
    float a[2][16], b[16];
    int row = thread / 32 * 16 + thread % 32 / 4;
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < depth; k++)
            a[half][k] = element(product.a, product.transposed, product.element_bytes, row + 8 * half, k);
    for (int j = 0; j < product.n / 4; j++) {
        int column = j / 2 * 8 + thread % 4 * 2 + j % 2;
        for (int k = 0; k < depth; k++) b[k] = element(product.b, product.transposed, product.element_bytes, column, k);
        for (int half = 0; half < 2; half++) {
            float& sum = product.sums[j / 2 * 4 + half * 2 + j % 2];
            float products_sum = 0.0f;
            for (int k = 0; k < depth; k++) products_sum += a[half][k] * b[k];
            sum = product.accumulate ? sum + products_sum : products_sum;
        }
    }
}

inline void start_product(float* sums, int n, int element_bytes, int transposed, uint64 a, uint64 b, int accumulate) {
    Products& mine = my_products();
    if (!mine.fenced) fail("wgmma without wgmma.fence since its accumulators were used");
    if (mine.count == MAX_PRODUCTS) fail("more than %d products at once", MAX_PRODUCTS);
    mine.pending[mine.count++] = {sums, a, b, n, element_bytes, transposed, accumulate, mine.group};
}

struct NamedBarrier {
    int arrived;
    unsigned int generation;
};
static NamedBarrier named_barriers[MAX_CLUSTER][16], cluster_barrier;

// Forget what a cluster before this, or a launch that failed, has left.
inline void begin_cluster() {
    static unsigned long long turn = 0;
    if (turn == state.turn) return;
    turn = state.turn;
    num_tensor_copies = cluster_barrier.arrived = 0;
    for (Products& one : products) one.count = one.fenced = 0;
    for (auto& block : named_barriers)
        for (NamedBarrier& named : block) named.arrived = 0;
}

inline void wait_for_all(NamedBarrier& barrier, int threads, const char* file, int line) {
    struct Awaited {
        NamedBarrier* barrier;
        unsigned int generation;
    } awaited = {&barrier, barrier.generation};
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    auto all_there = [](void* argument) {
        Awaited& a = *static_cast<Awaited*>(argument);
        return a.barrier->generation != a.generation;
    };
    wait_until(all_there, &awaited, file, line);
}

// The same place in the shared memory of another block of the cluster.
template <typename T> inline T* in_block(T* p, unsigned int rank) {
    if (rank >= state.cluster) fail("block %u of a cluster of %u", rank, state.cluster);
    unsigned char* here = reinterpret_cast<unsigned char*>(p);
    return reinterpret_cast<T*>(state.blocks[rank].dynamic_shared + (here - state.dynamic_shared));
}

inline void start_multicast(void* shared, const Map& map, uint64* barrier, int ranks, const int (&coordinates)[4],
                            const int (&offsets)[2]) {
    for (unsigned int rank = 0; ranks >> rank; rank++)
        if (ranks >> rank & 1)
            start_copy(shared, map, barrier, coordinates, offsets, in_block(static_cast<char*>(shared), rank),
                       in_block(barrier, rank));
}

}  // namespace emulation

inline uint32 shared_window(const void* p) { return emulation::window(p); }

inline void barrier_init(uint64* barrier, uint32 count) {
    using namespace emulation;
    begin_cluster();
    *reinterpret_cast<Barrier*>(barrier) = {0, static_cast<unsigned short>(count), static_cast<unsigned short>(count), 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(uint64* barrier, uint32 bytes) {
    emulation::Barrier& b = *reinterpret_cast<emulation::Barrier*>(barrier);
    if (!b.pending) emulation::fail("more threads arrived at a barrier than it counts");
    b.bytes += bytes;
    b.pending--;
    b.settle();
}
inline void barrier_arrive(uint64* barrier) { barrier_arrive_expect(barrier, 0); }
inline void barrier_wait(uint64* barrier, uint32 parity, EMULATION_PLACE) {
    struct Awaited {
        emulation::Barrier* barrier;
        uint32 parity;
    } awaited = {reinterpret_cast<emulation::Barrier*>(barrier), parity};
    auto ended = [](void* argument) {
        Awaited& a = *static_cast<Awaited*>(argument);
        if (a.barrier->phase == a.parity && !a.barrier->pending) emulation::copies_arrive(a.barrier);
        return a.barrier->phase != a.parity;
    };
    emulation::wait_until(ended, &awaited, file, line);
}
inline void named_barrier(int id, int threads, EMULATION_PLACE) {
    emulation::wait_for_all(emulation::named_barriers[emulation::state.current->rank][id], threads, file, line);
}

inline int cluster_rank() { return emulation::state.current->rank; }
inline void cluster_sync(EMULATION_PLACE) {
    emulation::begin_cluster();
    emulation::wait_for_all(emulation::cluster_barrier, emulation::state.block_threads * emulation::state.cluster, file,
                            line);
}
inline void barrier_arrive_at(uint64* barrier, int rank) { barrier_arrive(emulation::in_block(barrier, rank)); }

inline void shared_fence() {}
inline void prefetch_map(const TensorMap*) {}
inline void load_tiled_2d(void* shared, const TensorMap* map, uint64* barrier, int c0, int c1) {
    emulation::start_copy(shared, emulation::open_map(map, false, 2), barrier, {c0, c1, 0, 0}, {0, 0});
}
inline void load_tiled_3d(void* shared, const TensorMap* map, uint64* barrier, int c0, int c1, int c2) {
    emulation::start_copy(shared, emulation::open_map(map, false, 3), barrier, {c0, c1, c2, 0}, {0, 0});
}
inline void load_tiled_4d(void* shared, const TensorMap* map, uint64* barrier, int c0, int c1, int c2, int c3) {
    emulation::start_copy(shared, emulation::open_map(map, false, 4), barrier, {c0, c1, c2, c3}, {0, 0});
}
inline void load_im2col(void* shared, const TensorMap* map, uint64* barrier, int c, int w, int h, int n, int offset_w,
                        int offset_h) {
    emulation::start_copy(shared, emulation::open_map(map, true, 4), barrier, {c, w, h, n}, {offset_w, offset_h});
}

inline void multicast_tiled_2d(void* shared, const TensorMap* map, uint64* barrier, int ranks, int c0, int c1) {
    emulation::start_multicast(shared, emulation::open_map(map, false, 2), barrier, ranks, {c0, c1, 0, 0}, {0, 0});
}
inline void multicast_tiled_3d(void* shared, const TensorMap* map, uint64* barrier, int ranks, int c0, int c1, int c2) {
    emulation::start_multicast(shared, emulation::open_map(map, false, 3), barrier, ranks, {c0, c1, c2, 0}, {0, 0});
}
inline void multicast_im2col(void* shared, const TensorMap* map, uint64* barrier, int ranks, int c, int w, int h, int n,
                             int offset_w, int offset_h) {
    emulation::start_multicast(shared, emulation::open_map(map, true, 4), barrier, ranks, {c, w, h, n},
                               {offset_w, offset_h});
}

template <int registers> inline void registers_increase() {}
template <int registers> inline void registers_decrease() {}

inline void product_fence() { emulation::my_products().fenced = true; }
inline void product_commit() { emulation::my_products().group++; }
template <int newest> inline void product_wait(EMULATION_PLACE) {
    emulation::Products& mine = emulation::my_products();
    int kept = 0;
    for (int i = 0; i < mine.count; i++) {
        const emulation::Product product = mine.pending[i];
        if (product.group + newest >= mine.group)
            mine.pending[kept++] = product;
        else
            emulation::multiply(product);
    }
    mine.count = kept;
    if (newest == 0) mine.fenced = false;
    __syncwarp(emulation::FULL_MASK, file, line);  // .sync.aligned: the lanes of a warp go on together
}
template <int registers> inline void clear(float (&d)[registers]) { std::memset(d, 0, sizeof(d)); }
template <int transposed, int registers>
inline void product_bf16(float (&d)[registers], uint64 a, uint64 b, int accumulate) {
    emulation::start_product(d, 2 * registers, 2, transposed, a, b, accumulate);
}
template <int registers> inline void product_tf32(float (&d)[registers], uint64 a, uint64 b, int accumulate) {
    emulation::start_product(d, 2 * registers, 4, 0, a, b, accumulate);
}
