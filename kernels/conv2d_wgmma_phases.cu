// architectures: 90a
// Input gradients of convolutions with strides, in one launch: the pixels of the input fall into phases by their
// remainders, each a product with the taps that reach it (conv2d_wgmma_passes.cuh). Blocks go through the tiles of all
// phases, those of most steps first; pixels that no tap reaches get zeros from warps that have nothing to load.
#include "conv2d_wgmma_passes.cuh"

constexpr int MAX_PHASES = 4;

struct Maps { TensorMap of[MAX_PHASES]; };

// `count` phases, of which taps reach the first `reached`; columns are as many in all.
struct Phases {
    Forward phase[MAX_PHASES];
    int reached, count;
};

struct PhaseItem : Item {
    int phase;

    template <typename Tile>
    __device__ __forceinline__ PhaseItem(int phase, uint32 item, uint32 tile_rows, uint32 tile_columns, int steps,
                                         const Place<Tile>& place)
        : Item(item, tile_rows, tile_columns, 1, steps, place), phase(phase) {}
};

// Call `work(item)` for this block's tiles of phases that taps reach. Blocks take them in turn, there and back: who
// had a longer one of a round gets a shorter one of the next.
template <typename Tile, typename Work>
__device__ __forceinline__ void for_phases(const Phases& p, const Place<Tile>& place, Work work) {
    static_assert(Tile::CLUSTER == 1, "blocks on their own");
    const uint32 tile_columns = ceil_div(p.phase[0].columns, Tile::N);
    uint32 first = 0, tile_rows = 0;  // of the phase at hand
    int phase = -1, steps = 0;
    for (uint32 round = 0;; ++round) {
        const uint32 i = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
        while (phase < 0 || i - first >= tile_rows * tile_columns) {
            if (++phase >= p.reached) return;
            first += tile_rows * tile_columns;
            tile_rows = ceil_div(p.phase[phase].pixels.rows, Tile::M);
            const Windows& windows = p.phase[phase].windows;
            steps = windows.height * windows.width * windows.chunks;
        }
        work(PhaseItem(phase, i - first, tile_rows, tile_columns, steps, place));
    }
}

// Fill a line of `width` pixels, `pixel` elements apart, of each its `columns` elements; by one warp.
template <typename Element>
__device__ __forceinline__ void fill_line(Element* line, Element value, int width, int columns, int64 pixel) {
    const int lane = threadIdx.x % 32;
    int column = lane % columns;
    for (int j = lane / columns; j < width; j += 32 / columns) {
        line[j * pixel + column] = value;
        column += 32 % columns;
        if (column >= columns) {
            column -= columns;
            ++j;
        }
    }
}

template <typename Out>
__device__ __forceinline__ void clear_line(Out* y, const Forward& f, int image, int i) {
    constexpr int each = 16 / sizeof(Out);
    if (i >= f.pixels.height) return;
    y += f.out_first + image * f.out_image + i * f.out_row;
    if (f.columns % each == 0 && reinterpret_cast<uint64>(y) % 16 == 0)
        fill_line(reinterpret_cast<Vector*>(y), Vector{{0, 0, 0, 0}}, f.pixels.width, f.columns / each,
                  f.out_pixel / each);
    else
        fill_line(y, from_float<Out>(0.0f), f.pixels.width, f.columns, f.out_pixel);
}

// Put zeros where no tap reaches, as number `first` of `apart` warps that do. A warp goes through lines of all phases
// that lie near to each other: memory likes to get whole rows.
template <typename Out>
__device__ __forceinline__ void clear_phases(Out* y, const Phases& p, int first, int apart) {
    if (p.reached == p.count) return;
    const Pixels& pixels = p.phase[p.reached].pixels;
    int height = 0;
    for (int phase = p.reached; phase < p.count; ++phase) height = max(height, p.phase[phase].pixels.height);
    const int lines = pixels.rows / pixels.width / pixels.height * height;
    for (int line = first; line < lines; line += apart)
        for (int phase = p.reached; phase < p.count; ++phase)
            clear_line(y, p.phase[phase], line / height, line % height);
}

template <typename Tile, typename Out>
__device__ __forceinline__ void input_gradient(const Maps& maps, const TensorMap* filters, Out* y, const Phases& p) {
    DYNAMIC_SHARED(shared);
    Ring ring = open_ring<Tile>(shared);
    const Place<Tile> place;
    auto each = [&](auto work) { for_phases<Tile>(p, place, work); };
    if (threadIdx.x < GROUP) {
        registers_decrease<56>();
        if (threadIdx.x == 0) {
            for (int phase = 0; phase < p.reached; ++phase) prefetch_map(&maps.of[phase]);
            prefetch_map(filters);
            each([&](const PhaseItem& item) {
                const Forward f = p.phase[item.phase];
                load_forward<Tile>(shared, ring, &maps.of[item.phase], filters, item, f, place);
            });
        } else if (threadIdx.x >= 32) {
            constexpr int warps = GROUP / 32 - 1;
            clear_phases(y, p, blockIdx.x * warps + threadIdx.x / 32 - 1, gridDim.x * warps);
        }
    } else {
        registers_increase<224>();
        multiply<Tile, 0>(
            shared, ring, place, each, [&](const PhaseItem& item, const float(&sums)[Tile::BLOCKS][Tile::N / 2]) {
                Forward f = p.phase[item.phase];
                f.activation = IDENTITY;  // known to the compiler: no code for others
                store_forward<Tile>(sums, shared, threadIdx.x / GROUP - 1, nullptr, nullptr, y, item, f);
            });
    }
    close_ring<Tile>();
}

#define PHASES(name, type, blocks, n, ...)                                                                      \
    extern "C" __global__ void BLOCK name(const __grid_constant__ Maps maps,                                    \
                                          const __grid_constant__ TensorMap filters, type* y,                     \
                                          const __grid_constant__ Phases p) {                                   \
        input_gradient<Tile<type, blocks, n, __VA_ARGS__>>(maps, &filters, y, p);                               \
    }
#define PHASES_TYPES(tile, ...)                                     \
    PHASES(conv2d_phases_wgmma_##tile##_bf16, bf16, __VA_ARGS__)    \
    PHASES(conv2d_phases_wgmma_##tile##_tf32, float, __VA_ARGS__)
PHASES_TYPES(128x256, 1, 256, 4)
PHASES_TYPES(256x128, 2, 128, 4)
PHASES_TYPES(128x128, 1, 128, 6)
PHASES_TYPES(128x64, 1, 64, 8)
PHASES_TYPES(128x128a, 2, 128, 6, 1, 1, true)
PHASES_TYPES(256x64a, 4, 64, 4, 1, 1, true)
