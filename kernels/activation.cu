// ReLU, leaky ReLU and sums of two arrays; memory sets their speed.
#include "vector.cuh"

template <typename T, int V>
__device__ __forceinline__ void activation_forward(const T* x, T* y, int64 count, int activation) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        float values[decltype(width)::value];
        load(values, x + i);
        for (float& value : values) value = activate(value, activation);
        store(y + i, values);
    });
}

template <typename T, int V>
__device__ __forceinline__ void activation_backward(const T* grad_output, const T* y, T* grad_input, int64 count,
                                                    int activation) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        constexpr int n = decltype(width)::value;
        float grad[n], output[n];
        load(grad, grad_output + i);
        load(output, y + i);
#pragma unroll
        for (int v = 0; v < n; ++v) grad[v] *= slope(output[v], activation);
        store(grad_input + i, grad);
    });
}

template <typename T, int V>
__device__ __forceinline__ void add_forward(const T* a, const T* b, T* y, int64 count, int activation) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        constexpr int n = decltype(width)::value;
        float left[n], right[n];
        load(left, a + i);
        load(right, b + i);
#pragma unroll
        for (int v = 0; v < n; ++v) left[v] = activate(left[v] + right[v], activation);
        store(y + i, left);
    });
}

#define KERNELS(variant, type, T, V)                                                                                  \
    extern "C" __global__ void activation_forward_##variant##_##type(const T* x, T* y, int64 count, int activation) { \
        activation_forward<T, V>(x, y, count, activation);                                                            \
    }                                                                                                                 \
    extern "C" __global__ void activation_backward_##variant##_##type(const T* grad_output, const T* y,               \
                                                                      T* grad_input, int64 count, int activation) {   \
        activation_backward<T, V>(grad_output, y, grad_input, count, activation);                                     \
    }                                                                                                                 \
    extern "C" __global__ void add_forward_##variant##_##type(const T* a, const T* b, T* y, int64 count,              \
                                                              int activation) {                                       \
        add_forward<T, V>(a, b, y, count, activation);                                                                \
    }

KERNELS(vector, f32, float, 4)
KERNELS(scalar, f32, float, 1)
KERNELS(vector, bf16, bf16, 8)
KERNELS(scalar, bf16, bf16, 1)
