// Boxes of an array of up to four axes, to or from one flat array in which they lie one after the other.
//
// Copies move units of 16, 8, 4, 2 or 1 bytes, whatever the elements are; extents, offsets and strides count units.
// Sums know their elements.
#include "vector.cuh"

// `at` is where the box begins in the large array, `piece` in the flat one. The last axis is contiguous in both.
struct Box {
    int64 at, piece;
    int extents[4];
};

// hpcnn.ops.cuda.box has the same in NumPy. Strides of the first three axes; of boxes there are gridDim.z.
constexpr int most_boxes = 16;
struct Boxes {
    int64 strides[3];
    Box boxes[most_boxes];
};

// Call body(offset in the large array, offset in the flat one) for all units of box blockIdx.z.
template <typename Body> __device__ __forceinline__ void for_units(const Boxes& all, Body body) {
    const Box& box = all.boxes[blockIdx.z];
    const int run = box.extents[3];
    const int64 lines = int64(box.extents[0]) * box.extents[1] * box.extents[2];
    for (int64 line = int64(blockIdx.y) * blockDim.y + threadIdx.y; line < lines; line += int64(gridDim.y) * blockDim.y) {
        const int64 outer = line / box.extents[2];
        const int64 start = box.at + outer / box.extents[1] * all.strides[0] +
                            outer % box.extents[1] * all.strides[1] + line % box.extents[2] * all.strides[2];
        for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < run; i += int64(gridDim.x) * blockDim.x) {
            body(start + i, box.piece + line * run + i);
        }
    }
}

struct alignas(16) Bytes16 {
    uint64 low, high;
};

#define COPIES(bytes, Unit)                                                                           \
    extern "C" __global__ void box_pack_##bytes(const Unit* x, Unit* flat, Boxes boxes) {             \
        for_units(boxes, [=](int64 at, int64 piece) { flat[piece] = x[at]; });                        \
    }                                                                                                 \
    extern "C" __global__ void box_unpack_##bytes(Unit* x, const Unit* flat, Boxes boxes) {           \
        for_units(boxes, [=](int64 at, int64 piece) { x[at] = flat[piece]; });                        \
    }

COPIES(16, Bytes16)
COPIES(8, uint64)
COPIES(4, uint32)
COPIES(2, uint16)
COPIES(1, uint8)

// A unit is V elements.
template <typename T, int V>
__device__ __forceinline__ void add_units(T* x, const T* flat, const Boxes& boxes) {
    for_units(boxes, [=](int64 at, int64 piece) {
        float sum[V], term[V];
        load(sum, x + at * V);
        load(term, flat + piece * V);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += term[v];
        store(x + at * V, sum);
    });
}

#define SUMS(variant, type, T, V)                                                                       \
    extern "C" __global__ void box_add_##variant##_##type(T* x, const T* flat, Boxes boxes) {           \
        add_units<T, V>(x, flat, boxes);                                                                \
    }

SUMS(vector, f32, float, 4)
SUMS(scalar, f32, float, 1)
SUMS(vector, bf16, bf16, 8)
SUMS(scalar, bf16, bf16, 1)

extern "C" __global__ void box_add_scalar_f64(double* x, const double* flat, Boxes boxes) {
    for_units(boxes, [=](int64 at, int64 piece) { x[at] += flat[piece]; });
}
