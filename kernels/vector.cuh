// Loads and stores of several neighbours at once, loops over flat arrays, and sums over the rows of a block.
#pragma once
#include "common.cuh"

// V elements that are moved by one instruction; addresses are multiples of its size.
template <typename T, int V> struct alignas(V * sizeof(T)) Vector { T at[V]; };

// An int that is known when compiling, as an argument.
template <int V> struct Width { static constexpr int value = V; };

template <int V, typename T> __device__ __forceinline__ void load(float (&x)[V], const T* p) {
    Vector<T, V> t = *reinterpret_cast<const Vector<T, V>*>(p);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = to_float(t.at[v]);
}

template <int V, typename T> __device__ __forceinline__ void store(T* p, const float (&x)[V]) {
    Vector<T, V> t;
#pragma unroll
    for (int v = 0; v < V; ++v) t.at[v] = from_float<T>(x[v]);
    *reinterpret_cast<Vector<T, V>*>(p) = t;
}

// Coefficients of V neighbouring channels: float32, whatever the elements are; 16-byte aligned where V > 1.
template <int V> __device__ __forceinline__ void load_coefficients(float (&x)[V], const float* p) {
    constexpr int n = V % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int v = 0; v < V; v += n) {
        const Vector<float, n> t = *reinterpret_cast<const Vector<float, n>*>(p + v);
#pragma unroll
        for (int i = 0; i < n; ++i) x[v + i] = t.at[i];
    }
}

// Call body(Width<V>, first element) for all vectors of a flat array, and body(Width<1>, element) for what is left.
template <int V, typename Body> __device__ __forceinline__ void for_vectors(int64 count, Body body) {
    const int64 first = int64(blockIdx.x) * blockDim.x + threadIdx.x, step = int64(gridDim.x) * blockDim.x;
    for (int64 i = first; i < count / V; i += step) body(Width<V>(), i * V);
    if (V > 1 && first < count % V) body(Width<1>(), count / V * V + first);
}

// Sum over threadIdx.y, in a fixed order; the threads with threadIdx.y == 0 get it. All threads of the block must call,
// and `shared` has room for V numbers of each.
template <int V> __device__ __forceinline__ void sum_rows(double (&sum)[V], double* shared) {
    const int threads = blockDim.x * blockDim.y, width = blockDim.x, row = threadIdx.y;
    double* mine = shared + row * width + threadIdx.x;
    __syncthreads();  // who called before has read
    for (int rows = blockDim.y; rows > 1;) {
        const int half = (rows + 1) / 2;
        if (row >= half && row < rows) {
#pragma unroll
            for (int v = 0; v < V; ++v) mine[v * threads] = sum[v];
        }
        __syncthreads();
        if (row + half < rows) {
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += mine[v * threads + half * width];
        }
        rows = half;
    }
}
