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
    const int run = box.extents[3], lines = box.extents[0] * box.extents[1] * box.extents[2];  // which fits
    const int64 step = int64(gridDim.y) * blockDim.y;
    for (int64 line = int64(blockIdx.y) * blockDim.y + threadIdx.y; line < lines; line += step) {
        const int outer = int(line) / box.extents[2], outermost = outer / box.extents[1];
        const int64 start = box.at + (int(line) - outer * box.extents[2]) * all.strides[2] +
                            (outer - outermost * box.extents[1]) * all.strides[1] + outermost * all.strides[0];
        for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < run; i += int64(gridDim.x) * blockDim.x) {
            body(start + i, box.piece + line * run + i);
        }
    }
}

// A unit is n words.
#define COPIES(bytes, Word, n)                                                                                  \
    extern "C" __global__ void box_pack_##bytes(const Vector<Word, n>* x, Vector<Word, n>* flat, Boxes boxes) {  \
        for_units(boxes, [=](int64 at, int64 piece) { flat[piece] = x[at]; });                                  \
    }                                                                                                           \
    extern "C" __global__ void box_unpack_##bytes(Vector<Word, n>* x, const Vector<Word, n>* flat, Boxes boxes) { \
        for_units(boxes, [=](int64 at, int64 piece) { x[at] = flat[piece]; });                                  \
    }

COPIES(16, uint64, 2)
COPIES(8, uint64, 1)
COPIES(4, uint32, 1)
COPIES(2, uint16, 1)
COPIES(1, uint8, 1)

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
