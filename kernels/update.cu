// Weight updates in place over flat float32 arrays, one pass over memory each, and the sum of squares.
#include "vector.cuh"

// Each step rounds like its NumPy twin in hpcnn/ops/update.py, but where a product and a sum are one instruction.
__device__ __forceinline__ float decayed(float grad, float value, float scale, float weight_decay) {
    const float scaled = grad * scale;
    return weight_decay == 0.0f ? scaled : scaled + value * weight_decay;
}

// Ranges [ranges[2 * r], ranges[2 * r + 1]) without weight decay, in order, of a vector in which the arrays begin at
// `first`; none where `ranges` is null.
struct Spared {
    const int64* ranges;
    int count;
    int64 first;

    // Of elements i to i + n of the arrays: whether they are spared.
    template <int n> __device__ __forceinline__ void of(bool (&spared)[n], int64 i) const {
#pragma unroll
        for (int v = 0; v < n; ++v) spared[v] = false;
        if (!ranges) return;
        const int64 at = first + i;
        int low = 0, high = count;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (ranges[2 * middle] <= at) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
#pragma unroll
        for (int v = 0; v < n; ++v) {
            while (low < count && ranges[2 * low] <= at + v) ++low;
            spared[v] = low > 0 && at + v < ranges[2 * low - 1];
        }
    }
};

template <int V>
__device__ __forceinline__ void sgd(float* value, const float* grad, float* velocity, int64 count, float lr,
                                    float momentum, float weight_decay, float scale, int nesterov, Spared without) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        constexpr int n = decltype(width)::value;
        float w[n], g[n], u[n];
        load(w, value + i);
        load(g, grad + i);
        load(u, velocity + i);
        bool spared[n];
        without.of(spared, i);
#pragma unroll
        for (int v = 0; v < n; ++v) {
            const float step = decayed(g[v], w[v], scale, spared[v] ? 0.0f : weight_decay);
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
                                     const Adam& a, Spared without) {
    for_vectors<V>(count, [=](auto width, int64 i) {
        constexpr int n = decltype(width)::value;
        float w[n], g[n], m[n], s[n];
        load(w, value + i);
        load(g, grad + i);
        load(m, first + i);
        load(s, second + i);
        bool spared[n];
        without.of(spared, i);
#pragma unroll
        for (int v = 0; v < n; ++v) {
            if (!spared[v]) w[v] *= a.keep;
            const float step = decayed(g[v], w[v], a.scale, spared[v] ? 0.0f : a.weight_decay);
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

#define KERNELS(variant, V)                                                                                           \
    extern "C" __global__ void update_sgd_##variant##_f32(float* value, const float* grad, float* velocity,           \
                                                          int64 count, float lr, float momentum, float weight_decay,  \
                                                          float scale, int nesterov, const int64* spared, int ranges, \
                                                          int64 first) {                                              \
        sgd<V>(value, grad, velocity, count, lr, momentum, weight_decay, scale, nesterov, {spared, ranges, first});   \
    }                                                                                                                 \
    extern "C" __global__ void update_adam_##variant##_f32(float* value, const float* grad, float* first_moment,      \
                                                           float* second_moment, int64 count, Adam a,                 \
                                                           const int64* spared, int ranges, int64 first) {            \
        adam<V>(value, grad, first_moment, second_moment, count, a, {spared, ranges, first});                         \
    }                                                                                                                 \
    extern "C" __global__ void update_lars_##variant##_f32(float* value, const float* grad, float* velocity,          \
                                                           int64 count, float rate, float momentum,                   \
                                                           float weight_decay, float scale) {                         \
        lars<V>(value, grad, velocity, count, rate, momentum, weight_decay, scale);                                   \
    }

KERNELS(vector, 4)
KERNELS(scalar, 1)

// Sums of squares of stretches of one array, in float64: stretch s is bounds[2 * s] to bounds[2 * s + 1]; without
// bounds, all `count` elements. The order of a sum depends on the length of its stretch only.

// Blocks that share a stretch; hpcnn.ops.cuda.update has the same in Python.
__device__ __forceinline__ int64 blocks_of(int64 count) { return min(int64(1024), ceil_div(count, 1024)); }

__device__ __forceinline__ int64 length(const int64* bounds, int stretch, int64 count) {
    return bounds ? bounds[2 * stretch + 1] - bounds[2 * stretch] : count;
}

// partial: (stretches, gridDim.x). Blocks are (1, threads), as sum_rows wants them; blockIdx.y is the stretch. A thread
// takes groups of four neighbours whether it can load them at once or not.
extern "C" __global__ void update_squares_f32(const float* all, const int64* bounds, double* partial, int64 count) {
    __shared__ double shared[256];
    const float* x = all + (bounds ? bounds[2 * blockIdx.y] : 0);
    const int64 size = length(bounds, blockIdx.y, count), blocks = blocks_of(size);
    if (blockIdx.x >= blocks) return;
    const bool aligned = reinterpret_cast<uint64>(x) % 16 == 0;
    const int64 first = int64(blockIdx.x) * blockDim.y + threadIdx.y, step = blocks * blockDim.y;
    double sum[1] = {0.0};
    for (int64 group = first; group < size / 4; group += step) {
        float values[4];
        if (aligned) {
            load(values, x + group * 4);
        } else {
#pragma unroll
            for (int v = 0; v < 4; ++v) values[v] = x[group * 4 + v];
        }
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[0] += double(values[v]) * double(values[v]);
    }
    if (first < size % 4) {
        const double last = x[size / 4 * 4 + first];
        sum[0] += last * last;
    }
    sum_rows(sum, shared);
    if (threadIdx.y == 0) partial[int64(blockIdx.y) * gridDim.x + blockIdx.x] = sum[0];
}

// The sum of the blocks' sums: a block of (1, threads) for each stretch; `width` is the first kernel's gridDim.x.
extern "C" __global__ void update_squares_total(const double* partial, const int64* bounds, double* totals, int64 count,
                                                int width) {
    __shared__ double shared[256];
    const int64 blocks = blocks_of(length(bounds, blockIdx.x, count));
    double sum[1] = {0.0};
    for (int64 block = threadIdx.y; block < blocks; block += blockDim.y) {
        sum[0] += partial[int64(blockIdx.x) * width + block];
    }
    sum_rows(sum, shared);
    if (threadIdx.y == 0) totals[blockIdx.x] = sum[0];
}
