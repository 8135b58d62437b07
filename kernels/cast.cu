// Changes of element type. Four elements a thread: 16 bytes of float32, 8 of bf16, 4 of uint8.
#include "vector.cuh"

__device__ __forceinline__ float to_float(uint8 x) { return float(x); }

template <typename From, typename To, int V> __device__ __forceinline__ void cast(const From* x, To* y, int64 count) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        float values[decltype(width)::value];
        load(values, x + i);
        store(y + i, values);
    });
}

#define KERNELS(from, to, From, To)                                                                     \
    extern "C" __global__ void cast_##from##_vector_##to(const From* x, To* y, int64 count) {           \
        cast<From, To, 4>(x, y, count);                                                                 \
    }                                                                                                   \
    extern "C" __global__ void cast_##from##_scalar_##to(const From* x, To* y, int64 count) {           \
        cast<From, To, 1>(x, y, count);                                                                 \
    }

KERNELS(f32, bf16, float, bf16)
KERNELS(bf16, f32, bf16, float)
KERNELS(u8, f32, uint8, float)
KERNELS(u8, bf16, uint8, bf16)
