// What comes before and after the products of conv2d_mma: channels padded with zeros, partial sums added up.
#include "common.cuh"

// to (rows, wide) = from (rows, narrow), and zeros behind; a thread an element.
template <typename T>
__device__ __forceinline__ void pad_channels(const T* from, T* to, int64 rows, int narrow, int wide) {
    int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * wide) return;
    int64 row = i / wide;
    int channel = int(i - row * wide);
    to[i] = channel < narrow ? from[row * narrow + channel] : from_float<T>(0.0f);
}

// out[i] = activation(bias[i % channels] + sum of partials[s][i] over splits s, in their order); a thread an element.
template <typename T>
__device__ __forceinline__ void add_partials(const float* partials, const float* bias, T* out, int64 count, int splits,
                                             int channels, int activation) {
    int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < splits; s++) sum += partials[s * count + i];
    if (bias != nullptr) sum += bias[i % channels];
    out[i] = from_float<T>(activate(sum, activation));
}

#define AROUND(name, T)                                                                                               \
    extern "C" __global__ void conv2d_mma_pad_##name(const T* from, T* to, int64 rows, int narrow, int wide) {        \
        pad_channels<T>(from, to, rows, narrow, wide);                                                                \
    }                                                                                                                 \
    extern "C" __global__ void conv2d_mma_reduce_##name(const float* partials, const float* bias, T* out, int64 count, \
                                                        int splits, int channels, int activation) {                   \
        add_partials<T>(partials, bias, out, count, splits, channels, activation);                                    \
    }

AROUND(f32, float)
AROUND(bf16, bf16)
