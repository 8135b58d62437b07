// Weight updates in place over flat float32 arrays, one pass over memory each, and the sum of squares.
#include "vector.cuh"

// Each step rounds like its NumPy twin in hpcnn/ops/update.py, but where a product and a sum are one instruction.
__device__ __forceinline__ float decayed(float grad, float value, float scale, float weight_decay) {
    const float scaled = grad * scale;
    return weight_decay == 0.0f ? scaled : scaled + value * weight_decay;
}

template <int V>
__device__ __forceinline__ void sgd(float* value, const float* grad, float* velocity, int64 count, float lr,
                                    float momentum, float weight_decay, float scale, int nesterov) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        constexpr int n = decltype(width)::value;
        float w[n], g[n], u[n];
        load(w, value + i);
        load(g, grad + i);
        load(u, velocity + i);
#pragma unroll
        for (int v = 0; v < n; ++v) {
            const float step = decayed(g[v], w[v], scale, weight_decay);
            u[v] = u[v] * momentum + step;
            w[v] -= lr * (nesterov ? u[v] * momentum + step : u[v]);
        }
        store(velocity + i, u);
        store(value + i, w);
    });
}

// `keep`: 1 - lr * weight_decay of AdamW, else 1. `share1`, `share2`: 1 - beta. `rate`: lr / (1 - beta1^step).
// `root`: 1 / sqrt(1 - beta2^step).
struct Adam {
    float beta1, beta2, share1, share2, rate, root, epsilon, weight_decay, keep, scale;
};

template <int V>
__device__ __forceinline__ void adam(float* value, const float* grad, float* first, float* second, int64 count,
                                     const Adam& a) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        constexpr int n = decltype(width)::value;
        float w[n], g[n], m[n], s[n];
        load(w, value + i);
        load(g, grad + i);
        load(m, first + i);
        load(s, second + i);
#pragma unroll
        for (int v = 0; v < n; ++v) {
            w[v] *= a.keep;
            const float step = decayed(g[v], w[v], a.scale, a.weight_decay);
            m[v] = m[v] * a.beta1 + step * a.share1;
            s[v] = s[v] * a.beta2 + step * step * a.share2;
            w[v] -= m[v] / (sqrtf(s[v]) * a.root + a.epsilon) * a.rate;
        }
        store(first + i, m);
        store(second + i, s);
        store(value + i, w);
    });
}

template <int V>
__device__ __forceinline__ void lars(float* value, const float* grad, float* velocity, int64 count, float rate,
                                     float momentum, float weight_decay, float scale) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        constexpr int n = decltype(width)::value;
        float w[n], g[n], u[n];
        load(w, value + i);
        load(g, grad + i);
        load(u, velocity + i);
#pragma unroll
        for (int v = 0; v < n; ++v) {
            u[v] = u[v] * momentum + decayed(g[v], w[v], scale, weight_decay) * rate;
            w[v] -= u[v];
        }
        store(velocity + i, u);
        store(value + i, w);
    });
}

// One sum of squares a block, in float64. A thread takes groups of four neighbours whatever V (4 or 1) it loads them
// by, so that the alignment of an array does not change the sum. Blocks are (1, threads), as sum_rows wants them.
template <int V> __device__ __forceinline__ void squares(const float* x, double* partial, int64 count) {
    __shared__ double shared[256];
    double sum[1] = {0.0};
    const int64 first = int64(blockIdx.x) * blockDim.y + threadIdx.y, step = int64(gridDim.x) * blockDim.y;
    for (int64 group = first; group < count / 4; group += step) {
        float values[4];
        if (V == 4) {
            load(values, x + group * 4);
        } else {
#pragma unroll
            for (int v = 0; v < 4; ++v) values[v] = x[group * 4 + v];
        }
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[0] += double(values[v]) * double(values[v]);
    }
    if (first < count % 4) {
        const double last = x[count / 4 * 4 + first];
        sum[0] += last * last;
    }
    sum_rows(sum, shared);
    if (threadIdx.y == 0) partial[blockIdx.x] = sum[0];
}

#define KERNELS(variant, V)                                                                                           \
    extern "C" __global__ void update_sgd_##variant##_f32(float* value, const float* grad, float* velocity,           \
                                                          int64 count, float lr, float momentum, float weight_decay,  \
                                                          float scale, int nesterov) {                                \
        sgd<V>(value, grad, velocity, count, lr, momentum, weight_decay, scale, nesterov);                            \
    }                                                                                                                 \
    extern "C" __global__ void update_adam_##variant##_f32(float* value, const float* grad, float* first,             \
                                                           float* second, int64 count, Adam a) {                      \
        adam<V>(value, grad, first, second, count, a);                                                                \
    }                                                                                                                 \
    extern "C" __global__ void update_lars_##variant##_f32(float* value, const float* grad, float* velocity,          \
                                                           int64 count, float rate, float momentum,                   \
                                                           float weight_decay, float scale) {                         \
        lars<V>(value, grad, velocity, count, rate, momentum, weight_decay, scale);                                   \
    }                                                                                                                 \
    extern "C" __global__ void update_squares_##variant##_f32(const float* x, double* partial, int64 count) {         \
        squares<V>(x, partial, count);                                                                                \
    }

KERNELS(vector, 4)
KERNELS(scalar, 1)

// The sum of the blocks' sums, by one block of (1, threads).
extern "C" __global__ void update_squares_total(const double* partial, double* total, int blocks) {
    __shared__ double shared[256];
    double sum[1] = {0.0};
    for (int block = threadIdx.y; block < blocks; block += blockDim.y) sum[0] += partial[block];
    sum_rows(sum, shared);
    if (threadIdx.y == 0) *total = sum[0];
}
