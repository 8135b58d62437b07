// Dropout by counters: element e of sample i is kept if the 24-bit draw for counter (i << 32 | e) is at least the rate.
// Draws are those of hpcnn/rng.py, bit for bit.
#include "vector.cuh"

// SplitMix64's mixing of a counter (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
__device__ __forceinline__ float uniform(uint64 stream, uint64 counter) {
    const uint64 golden = 0x9E3779B97F4A7C15ull;
    uint64 z = counter * golden + (stream + golden);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return float(uint32(z >> 40)) * 5.9604644775390625e-8f;  // 2^-24
}

// x, y, keep: (samples, size). Elements count from `first` on, or are as `numbers` says; vectors need the former.
template <typename T, int V>
__device__ __forceinline__ void dropout_forward(const T* x, T* y, uint8* keep, const int64* indices,
                                                const uint64* numbers, uint64 first, int64 samples, int64 size,
                                                uint64 stream, float rate, float scale) {
    const int64 step = int64(gridDim.x) * blockDim.x * V;
    for (int64 e = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * V; e < size; e += step) {
        const uint64 number = numbers ? numbers[e] : first + e;
        for (int64 n = int64(blockIdx.y) * blockDim.y + threadIdx.y; n < samples; n += int64(gridDim.y) * blockDim.y) {
            const uint64 high = uint64(indices[n]) << 32;
            float values[V];
            Vector<uint8, V> kept;
            load(values, x + n * size + e);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                kept.at[v] = uniform(stream, high | (number + v)) >= rate;
                values[v] = values[v] * scale * (kept.at[v] ? 1.0f : 0.0f);
            }
            store(y + n * size + e, values);
            *reinterpret_cast<Vector<uint8, V>*>(keep + n * size + e) = kept;
        }
    }
}

template <typename T, int V>
__device__ __forceinline__ void dropout_backward(const T* grad_output, const uint8* keep, T* grad_input, int64 count,
                                                 float scale) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        constexpr int n = decltype(width)::value;
        float grad[n];
        load(grad, grad_output + i);
        const Vector<uint8, n> kept = *reinterpret_cast<const Vector<uint8, n>*>(keep + i);
#pragma unroll
        for (int v = 0; v < n; ++v) grad[v] = grad[v] * scale * (kept.at[v] ? 1.0f : 0.0f);
        store(grad_input + i, grad);
    });
}

#define KERNELS(variant, type, T, V)                                                                                   \
    extern "C" __global__ void dropout_forward_##variant##_##type(                                                     \
        const T* x, T* y, uint8* keep, const int64* indices, const uint64* numbers, uint64 first, int64 samples,       \
        int64 size, uint64 stream, float rate, float scale) {                                                          \
        dropout_forward<T, V>(x, y, keep, indices, numbers, first, samples, size, stream, rate, scale);                \
    }                                                                                                                  \
    extern "C" __global__ void dropout_backward_##variant##_##type(const T* grad_output, const uint8* keep,            \
                                                                   T* grad_input, int64 count, float scale) {          \
        dropout_backward<T, V>(grad_output, keep, grad_input, count, scale);                                           \
    }

KERNELS(vector, f32, float, 4)
KERNELS(scalar, f32, float, 1)
KERNELS(vector, bf16, bf16, 8)
KERNELS(scalar, bf16, bf16, 1)
